"""One sequence on its way out: the tokens of a worker become text, log-probabilities, usage and metrics.

Knows tokens and time; knows no worker and no transport.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

from cluster.frontend.generation.detokenizer import Detokenizer
from cluster.frontend.generation.token_offsets import TokenOffsets
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.observability.metrics import FrontendMetrics
from cluster.types import FinishReason, GenerationRequest, TokenChunk, TokenLogprob

LOWEST_LOGPROB = -9999.0  # JSON has no infinity; the value OpenAI gives for "not at all"


@dataclass(frozen=True, slots=True, kw_only=True)
class SamplingOptions:
    """Sampling as a client may leave it open; fields are those of `SamplingParams` where they have its names.

    None is the model author's choice where there is one; else `max_tokens` None is the rest of the context, `seed` None
    a random one, and the others have the defaults of `SamplingParams`. `n` answers are given to each prompt.
    `bad_words` are text. -1 for log-probabilities is as many as the server gives. `max_tokens` 0 needs those of the
    prompt. `truncate_prompt_tokens` keeps that many last tokens of the prompt, -1 what the context has room for;
    with `truncation_side` right the first ones.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    seed: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    num_logprobs: int | None = None
    n: int = 1
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    repetition_penalty: float | None = None
    logit_bias: tuple[tuple[int, float], ...] = ()
    allowed_token_ids: tuple[int, ...] = ()
    bad_words: tuple[str, ...] = ()
    num_prompt_logprobs: int | None = None
    logprob_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    skip_special_tokens: bool = True
    truncate_prompt_tokens: int | None = None
    truncation_side: Literal["left", "right"] = "left"


@dataclass(frozen=True, slots=True)
class TokenText:
    """A token for people: its text (U+FFFD for a part of a character), its bytes, its log-probability."""

    text: str
    raw: bytes
    logprob: float
    token_id: int


@dataclass(frozen=True, slots=True)
class LogprobEntry:
    """The chosen token and the likeliest ones at one position; the rank is known in prompts only.

    `offset`: the character of the answer's text that the chosen token begins at; 0 in prompts.
    """

    chosen: TokenText
    top: tuple[TokenText, ...]
    rank: int | None = None
    offset: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceTimes:
    """Seconds of one sequence: waiting in its worker, from there to its first token, and on to its last one."""

    queued_s: float
    first_token_s: float
    generation_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Usage:
    """Tokens of one sequence: `cached_tokens` of the prompt needed no computing. Of several sequences: no times."""

    prompt_tokens: int
    completion_tokens: int
    cached_tokens: int
    times: SequenceTimes | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TextChunk:
    """Text that became certain. The last chunk, and only it, has finish reason and usage.

    `text` may be empty (held back) while `token_ids` are not, and the other way round. `stop_reason` is the stop
    string or the stop token id that ended the sequence, if one did. `prompt_logprobs`, where asked for, come once: one
    for each prompt token but the first.
    """

    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[LogprobEntry, ...] | None = None
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    stop_reason: str | int | None = None
    prompt_logprobs: tuple[LogprobEntry, ...] | None = None


class RunningSequence:
    """What one sequence accumulates until it ends."""

    def __init__(
        self, request: GenerationRequest, tokenizer: Tokenizer, eos_token_ids: Sequence[int], metrics: FrontendMetrics
    ) -> None:
        sampling = request.sampling
        self._num_prompt = len(request.prompt_ids)
        self._only_scores = request.only_scores
        self._stop_token_ids = frozenset(sampling.stop_token_ids)
        self._end_ids = self._stop_token_ids.union(eos_token_ids)
        self._shows_stop = sampling.include_stop_str_in_output
        self._tokenizer = tokenizer
        self._metrics = metrics
        skips = sampling.skip_special_tokens
        self._detokenizer = Detokenizer(
            partial(tokenizer.decode, skip_special_tokens=skips),
            prompt_ids=request.prompt_ids,
            continues_character=bool(tokenizer.unfinished_bytes(request.prompt_ids, skip_special_tokens=skips)),
            stop=sampling.stop,
            min_tokens=sampling.min_tokens,
            includes_stop=sampling.include_stop_str_in_output,
        )
        self._offsets: TokenOffsets | None = None
        if sampling.num_logprobs is not None:
            self._offsets = TokenOffsets(tokenizer, prompt_ids=request.prompt_ids, skip_special_tokens=skips)
        self._num_tokens = 0
        self._num_cached = 0
        self._started_s = time.perf_counter()
        self._last_token_s = self._started_s
        self._first_token_s: float | None = None
        self._queued_s = 0.0

    def take(self, chunk: TokenChunk) -> TextChunk:
        """Text of the worker's next tokens; the result has a finish reason if the sequence ends here."""
        self._observe_wait(len(chunk.token_ids), chunk.queued_s)
        self._num_cached = max(self._num_cached, chunk.num_cached_tokens)
        if self._only_scores:
            return self._scores(chunk)
        visible = chunk.token_ids
        ended_by: str | int | None = None
        if chunk.finish_reason is FinishReason.STOP and visible and visible[-1] in self._end_ids:
            ended_by = visible[-1] if visible[-1] in self._stop_token_ids else None
            if not self._shows_stop:
                visible = visible[:-1]  # the token that ends a sequence is counted, but is no text
        piece = self._detokenizer.push(visible)
        text, matched, reason = piece.text, piece.stop, chunk.finish_reason
        num_used = len(chunk.token_ids)
        if matched is not None:
            reason = FinishReason.STOP
            num_used = piece.num_tokens
        elif reason is not None:
            rest = self._detokenizer.finish()
            text += rest.text
            matched = rest.stop
            reason = FinishReason.STOP if matched is not None else reason
        self._num_tokens += num_used
        scored = chunk.prompt_logprobs
        entries = None if chunk.logprobs is None else self._entries(chunk.logprobs[:num_used], len(visible))
        return TextChunk(
            text=text,
            token_ids=chunk.token_ids[:num_used],
            logprobs=entries,
            finish_reason=reason,
            usage=None if reason is None else self._usage(),
            stop_reason=ended_by if matched is None else matched,
            prompt_logprobs=None if scored is None else tuple(map(self._entry, scored)),
        )

    def _scores(self, chunk: TokenChunk) -> TextChunk:
        """What is told of a prompt that is only scored: everything but the token behind it."""
        scored = chunk.prompt_logprobs
        return TextChunk(
            text=self._detokenizer.finish().text,
            token_ids=(),
            logprobs=None if chunk.logprobs is None else (),
            finish_reason=None if chunk.finish_reason is None else FinishReason.LENGTH,
            usage=None if chunk.finish_reason is None else self._usage(),
            prompt_logprobs=None if scored is None else tuple(map(self._entry, scored)),
        )

    def end(self, reason: FinishReason) -> TextChunk:
        """What is left to say when the sequence ends here for a `reason` of our own."""
        return TextChunk(text=self._detokenizer.finish().text, token_ids=(), finish_reason=reason, usage=self._usage())

    def count(self, finished_reason: str) -> None:
        """Report the end of the sequence to the metrics."""
        self._metrics.count_sequence(
            finished_reason=finished_reason,
            wait_s=time.perf_counter() - self._started_s,
            prompt_tokens=self._num_prompt,
            completion_tokens=self._num_tokens,
            cached_tokens=self._num_cached,
        )

    def _usage(self) -> Usage:
        return Usage(
            prompt_tokens=self._num_prompt,
            completion_tokens=self._num_tokens,
            cached_tokens=self._num_cached,
            times=self._times(),
        )

    def _times(self) -> SequenceTimes | None:
        first_s = self._first_token_s
        if first_s is None:
            return None
        return SequenceTimes(
            queued_s=self._queued_s,
            first_token_s=max(first_s - self._started_s - self._queued_s, 0.0),  # two processes' clocks
            generation_s=self._last_token_s - first_s,
        )

    def _observe_wait(self, num_tokens: int, queued_s: float) -> None:
        if not num_tokens:
            return
        now_s = time.perf_counter()
        if self._first_token_s is None:
            self._first_token_s, self._queued_s = now_s, queued_s
            self._metrics.observe_first_token(now_s - self._started_s)
        else:
            self._metrics.observe_tokens(num_tokens, now_s - self._last_token_s)
        self._last_token_s = now_s

    def _entries(self, logprobs: Sequence[TokenLogprob], num_shown: int) -> tuple[LogprobEntry, ...]:
        """Of the next tokens, the first `num_shown` of which have text."""
        entries = map(self._entry, logprobs)
        if self._offsets is None:
            return tuple(entries)
        return tuple(
            replace(entry, offset=self._offsets.push(entry.chosen.token_id, is_shown=index < num_shown))
            for index, entry in enumerate(entries)
        )

    def _entry(self, logprob: TokenLogprob) -> LogprobEntry:
        top = tuple(token_text(self._tokenizer, token_id, value) for token_id, value in logprob.top)
        return LogprobEntry(token_text(self._tokenizer, logprob.token_id, logprob.logprob), top, logprob.rank)


def token_text(tokenizer: Tokenizer, token_id: int, logprob: float) -> TokenText:
    """A token with its text and bytes."""
    raw = tokenizer.token_bytes(token_id)
    return TokenText(raw.decode(errors="replace"), raw, max(logprob, LOWEST_LOGPROB), token_id)
