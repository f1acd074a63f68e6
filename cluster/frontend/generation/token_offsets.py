"""Where each token of a text begins in it. Knows bytes and characters; knows no requests.

Tokens are bytes and a text is characters: a token may begin within a character, end within one, or have no text.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from cluster.frontend.generation.byte_runs import CharacterDecoder
from cluster.frontend.generation.detokenizer import Detokenizer
from cluster.frontend.generation.tokenizer import Tokenizer


class CharacterCount:
    """Counts the characters of a text that comes as bytes, cut anywhere."""

    def __init__(self, unfinished: bytes = b"") -> None:
        """`unfinished` bytes came before, and begin a character."""
        self.num_chars = 0
        self._decoder = CharacterDecoder()
        self._decoder.push(unfinished)

    def push(self, raw: bytes) -> int:
        """Offset of the character that the first byte is in; without bytes, of what comes next.

        It is known at once: later bytes decide what an unfinished character becomes, but not where it is.
        """
        first = self._decoder.push(raw[:1])
        is_open = bool(self._decoder.unfinished)
        offset = self.num_chars + len(first) - (1 if raw and not is_open else 0)
        self.num_chars += len(first) + len(self._decoder.push(raw[1:]))
        return offset


class TokenOffsets:
    """Offsets in a text that grows token by token; they are the same however it is streamed."""

    def __init__(
        self, tokenizer: Tokenizer, *, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        """Offsets count from the end of the prompt's text; a character that it leaves unfinished comes behind it."""
        self._tokenizer = tokenizer
        self._skips = skip_special_tokens
        unfinished = tokenizer.unfinished_bytes(prompt_ids, skip_special_tokens=skip_special_tokens)
        self._context = Detokenizer(
            partial(tokenizer.decode, skip_special_tokens=skip_special_tokens),
            prompt_ids=prompt_ids,
            continues_character=bool(unfinished),
        )
        self._count = CharacterCount(unfinished)
        self._opens_text = not self._context.follows_text and not unfinished
        self._num_chars = 0

    def push(self, token_id: int, *, is_shown: bool = True) -> int:
        """Offset of the next token; one that is not shown, because it ended the sequence, has no text."""
        if self._tokenizer.is_made_of_bytes:
            raw = self._tokenizer.text_bytes(token_id, opens_text=self._opens_text, skip_special_tokens=self._skips)
            self._opens_text = self._opens_text and not raw
            return self._count.push(raw if is_shown else b"")
        offset = self._num_chars
        self._num_chars += len(self._context.push((token_id,)).text) if is_shown else 0
        return offset


def offsets_in_prompt(tokenizer: Tokenizer, prompt_ids: Sequence[int], text: str) -> list[int]:
    """Offsets of a prompt's tokens in `text`: the prompt as its client wrote it, or as its ids are decoded.

    A special token that the text does not show, such as one that the tokenizer put before it, has no text. Where a
    tokenizer changes what it reads (accents composed, letters lowered), its own record of places counts.
    """
    found = _found_by_bytes(tokenizer, prompt_ids, text) or tokenizer.places(text, prompt_ids)
    if found is None:
        count = TokenOffsets(tokenizer)
        found = [min(count.push(token_id), len(text)) for token_id in prompt_ids]
    return found


def _found_by_bytes(tokenizer: Tokenizer, prompt_ids: Sequence[int], text: str) -> list[int] | None:
    """Offsets, if the tokens' bytes are those of the text."""
    if not tokenizer.is_made_of_bytes:
        return None
    count = CharacterCount()
    shown = bytearray()
    offsets: list[int] = []
    for token_id in prompt_ids:
        name = tokenizer.special_text(token_id)
        is_hidden = name is not None and not text.startswith(name, count.num_chars)
        raw = b"" if is_hidden else tokenizer.text_bytes(token_id, opens_text=not shown, skip_special_tokens=False)
        offsets.append(count.push(raw))
        shown += raw
    decoded = CharacterDecoder().push(bytes(shown))
    return offsets if decoded == text else None
