"""Log-probabilities in the shapes of the OpenAI API, and of vLLM for those of the prompt. Knows no envelope."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.frontend.generation.sequence import LogprobEntry, TextChunk, TokenText


@dataclass(frozen=True, slots=True)
class Echo:
    """What the choices of one prompt begin with: its text and, for log-probabilities, its first token.

    `offsets`, where log-probabilities are asked for: the character at which each token of the prompt begins.
    """

    text: str
    first_token: TokenText
    offsets: Sequence[int] = ()


class LogprobFormat:
    """How tokens are named: by their text or, where a client asks for it, as `token_id:N`."""

    def __init__(self, *, names_ids: bool = False) -> None:
        self._names_ids = names_ids

    def chat(self, entries: Sequence[LogprobEntry]) -> dict[str, object]:
        """`logprobs` of a chat choice."""
        content = [
            {**self._chat_token(entry.chosen), "top_logprobs": list(map(self._chat_token, entry.top))}
            for entry in entries
        ]
        return {"content": content, "refusal": None}

    def completion(
        self, entries: Sequence[LogprobEntry], *, echo: Echo | None = None, prompt: Sequence[LogprobEntry] | None = None
    ) -> dict[str, object]:
        """`logprobs` of a text choice, behind its `echo` if it has one.

        `prompt`, given where the prompt's tokens are listed too, has one entry for each but the first, which has none.
        """
        base = 0 if echo is None else len(echo.text)
        offsets = [base + entry.offset for entry in entries]
        if echo is not None and prompt is not None:
            entries = [*prompt, *entries]
            offsets = [*echo.offsets, *offsets]
        tokens = [entry.chosen for entry in entries]
        values: list[float | None] = [token.logprob for token in tokens]
        tops: list[dict[str, float] | None] = [
            {self._key(token): token.logprob for token in (entry.chosen, *entry.top)} for entry in entries
        ]
        if echo is not None and prompt is not None:
            tokens, values, tops = [echo.first_token, *tokens], [None, *values], [None, *tops]
        keys = [self._key(token) for token in tokens]
        return {"tokens": keys, "token_logprobs": values, "top_logprobs": tops, "text_offset": offsets}

    def _chat_token(self, token: TokenText) -> dict[str, object]:
        name = f"token_id:{token.token_id}" if self._names_ids else token.text
        return {"token": name, "bytes": list(token.raw), "logprob": token.logprob}

    def _key(self, token: TokenText) -> str:
        """A part of a character is written as OpenAI does, so that two of them stay two keys."""
        if self._names_ids:
            return f"token_id:{token.token_id}"
        if "\N{REPLACEMENT CHARACTER}" not in token.text:
            return token.text
        return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)


def prompt_logprobs_json(entries: Sequence[LogprobEntry]) -> list[dict[str, object] | None]:
    """vLLM's `prompt_logprobs`: one object by token id for each prompt token, null for the first."""
    return [None, *map(_prompt_position, entries)]


def entries_of(chunks: Sequence[TextChunk]) -> list[LogprobEntry] | None:
    """Log-probabilities of all generated tokens; None if nobody asked."""
    if all(chunk.logprobs is None for chunk in chunks):
        return None
    return [entry for chunk in chunks for entry in chunk.logprobs or ()]


def prompt_entries_of(chunks: Sequence[TextChunk]) -> tuple[LogprobEntry, ...] | None:
    """Log-probabilities of the prompt; None if nobody asked."""
    return next((chunk.prompt_logprobs for chunk in chunks if chunk.prompt_logprobs is not None), None)


def _prompt_position(entry: LogprobEntry) -> dict[str, object]:
    place: dict[str, object] = {str(entry.chosen.token_id): _ranked(entry.chosen, entry.rank)}
    for rank, token in enumerate(entry.top, 1):
        place.setdefault(str(token.token_id), _ranked(token, rank))
    return place


def _ranked(token: TokenText, rank: int | None) -> dict[str, object]:
    return {"logprob": token.logprob, "rank": rank, "decoded_token": token.text}
