"""Incremental text of one sequence, and its stop strings. Pure: token ids in, text out, no clock, no I/O.

Text is emitted only when no later token can change it: a trailing U+FFFD may be the first bytes of a character,
and a trailing piece of a stop string may become the whole. Emitted pieces concatenate to the one-shot decode of
all ids, cut before the stop string, however the ids were split into pushes.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_CONTEXT_TOKENS = 6
_CHARACTER_TOKENS = 16  # more than a character has bytes, with room for tokens without text between them


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that became certain, how many of the pushed tokens were used, and the stop string that ended it."""

    text: str
    num_tokens: int
    stop: str | None = None


class Detokenizer:
    """Decoding state of one sequence; once a stop string matched, it takes no more tokens."""

    def __init__(
        self,
        decode: Callable[[Sequence[int]], str],
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
        min_tokens: int = 0,
        includes_stop: bool = False,
        continues_character: bool = False,
    ) -> None:
        """`prompt_ids` give the first token its context; stop strings are not looked for within `min_tokens`.

        `includes_stop` leaves the stop string that ends the text in it. `continues_character`: the prompt ends within
        a character, which then is the first of the text.
        """
        self._decode = decode
        self._window, self._sent = _context(decode, prompt_ids, continues_character)
        self._num_sent_ids = len(self._window)
        self._stop = _StopStrings(stop, included=includes_stop)
        self._unwatched_tokens = min_tokens if stop else 0

    @property
    def follows_text(self) -> bool:
        """Whether the tokens so far, with those of the prompt, have text that the next one continues."""
        return self._sent > 0

    def push(self, ids: Sequence[int]) -> Piece:
        """Take more token ids. Tokens behind a stop string are not used."""
        if not self._stop.is_active:
            return Piece(self._advance(ids), len(ids))
        texts: list[str] = []
        for count, token_id in enumerate(ids, 1):
            text = self._advance((token_id,))
            if self._unwatched_tokens > 0:
                self._unwatched_tokens -= 1
                texts.append(text)
                continue
            safe, matched = self._stop.push(text)
            texts.append(safe)
            if matched is not None:
                return Piece("".join(texts), count, matched)
        return Piece("".join(texts), len(ids))

    def finish(self) -> Piece:
        """Everything still held back: no more tokens will come."""
        rest = self._decode(self._window)[self._sent :]
        self._sent += len(rest)
        safe, matched = self._stop.push(rest)
        return Piece(safe if matched is not None else safe + self._stop.release(), 0, matched)

    def _advance(self, ids: Sequence[int]) -> str:
        """Decode a window of the sequence that starts one emission back, and return what is new and certain.

        The window starts at a character boundary, and its first part was emitted before: decoders that treat the
        first token differently (a stripped space) do so in both halves of the difference.
        """
        before = len(self._window)
        self._window.extend(ids)
        text = self._decode(self._window)
        if text.endswith(_REPLACEMENT):
            return self._before_last(text) if before - self._num_sent_ids >= _CHARACTER_TOKENS else ""
        if len(text) <= self._sent:
            if self._sent:  # tokens without text (special ones) behind emitted text: forget them
                del self._window[before:]
            return ""
        new = text[self._sent :]
        del self._window[: self._num_sent_ids]
        self._num_sent_ids = len(self._window)
        self._sent = len(self._decode(self._window))
        return new

    def _before_last(self, text: str) -> str:
        """All but the last U+FFFD: of so many tokens, only the last ones can be bytes of a character to come.

        Without this, a model that writes nothing but broken bytes would have all of them decoded again at each token.
        """
        new = text[self._sent : -1]
        del self._window[:-_CHARACTER_TOKENS]
        self._num_sent_ids = 0
        self._sent = len(self._decode(self._window)) - 1
        return new


class _StopStrings:
    """Finds the stop string that ends first in a stream of text; holds back what may become one."""

    def __init__(self, stop: Sequence[str], *, included: bool) -> None:
        self._stop = tuple(stop)
        self._included = included
        self._held = ""

    @property
    def is_active(self) -> bool:
        return bool(self._stop)

    def push(self, text: str) -> tuple[str, str | None]:
        """Text that is safe to show, and the stop string if one is complete."""
        if not text or not self._stop:
            return text, None
        text = self._held + text
        self._held = ""
        found = [(start + len(stop), start, stop) for stop in self._stop if (start := text.find(stop)) >= 0]
        if found:
            # The first to end, not to begin: then the answer does not depend on how tokens were grouped.
            end, start, stop = min(found)
            return text[: end if self._included else start], stop
        num_held = max(_overlap(text, stop) for stop in self._stop)
        if num_held:
            self._held = text[-num_held:]
            text = text[:-num_held]
        return text, None

    def release(self) -> str:
        held, self._held = self._held, ""
        return held


def _overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`."""
    for length in range(min(len(stop) - 1, len(text)), 0, -1):
        if text.endswith(stop[:length]):
            return length
    return 0


def _context(
    decode: Callable[[Sequence[int]], str], prompt_ids: Sequence[int], continues_character: bool
) -> tuple[list[int], int]:
    """The last prompt tokens as the window's emitted part, but for a character that is not finished."""
    window = list(prompt_ids[-_CONTEXT_TOKENS:])
    text = decode(window) if window else ""
    is_unfinished = continues_character and text.endswith(_REPLACEMENT)
    return window, len(text) - (1 if is_unfinished else 0)
