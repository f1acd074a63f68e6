"""Tokens that are single bytes (`<0xE2>`), of vocabularies with byte fallback. Pure: pieces in, pieces out."""

from __future__ import annotations

import codecs
import re
from collections.abc import Sequence

_BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


def byte_of_piece(piece: str) -> int | None:
    """The byte that a vocabulary entry stands for; None for other entries."""
    found = _BYTE.fullmatch(piece)
    return None if found is None else int(found.group(1), 16)


class CharacterDecoder:
    r"""UTF-8 that comes in pieces, to text; a stretch that cannot be a character becomes U+FFFD as soon as that is so.

    Python's own decoder holds ED A0 to ED BF back, as if a third byte could make a character of them; none does.

    >>> decoder = CharacterDecoder()
    >>> decoder.push(b"\xc3"), decoder.unfinished, decoder.push(b"\xa9"), decoder.push(b"\xed\xa0") == 2 * "\ufffd"
    ('', b'\xc3', 'é', True)
    """

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    @property
    def unfinished(self) -> bytes:
        """What began a character."""
        return self._decoder.getstate()[0]

    def push(self, raw: bytes) -> str:
        """The text of some more bytes."""
        text = self._decoder.decode(raw)
        held = self.unfinished
        return text + self._decoder.decode(b"", final=True) if held[:1] == b"\xed" and held[1:] >= b"\xa0" else text


def mended_byte_runs(pieces: Sequence[str]) -> list[str]:
    """Pieces whose runs of bytes are all UTF-8: each stretch that is not has become one U+FFFD."""
    mended: list[str] = []
    run: list[str] = []
    for piece in pieces:
        if byte_of_piece(piece) is not None:
            run.append(piece)
            continue
        mended += _mended(run)
        run.clear()
        mended.append(piece)
    return mended + _mended(run)


def _mended(run: Sequence[str]) -> list[str]:
    """One run of byte pieces: characters keep theirs, anything else is a U+FFFD as Unicode recommends it."""
    raw = bytes(byte for piece in run if (byte := byte_of_piece(piece)) is not None)
    mended: list[str] = []
    while raw:
        try:
            raw.decode()
            broken, rest = len(raw), len(raw)
        except UnicodeDecodeError as error:
            broken, rest = error.start, error.end
        mended += [f"<0x{byte:02X}>" for byte in raw[:broken]]
        mended += [_REPLACEMENT] if rest > broken else []
        raw = raw[rest:]
    return mended
