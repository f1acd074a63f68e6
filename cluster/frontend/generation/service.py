"""The one place where HTTP, gRPC and the command line end: prompt in, text out.

Knows tokens, stop strings, limits and deadlines; knows no transport and not how the worker computes.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

from cluster.config.sections import FrontendConfig
from cluster.errors import InvalidRequest, MoesaicError, Overloaded, Unavailable
from cluster.frontend.generation.choices import interleave
from cluster.frontend.generation.deadline import SequenceDeadline
from cluster.frontend.generation.input_pool import InputPool
from cluster.frontend.generation.sampling import check_lengths, check_token_ids, resolve_sampling, truncated_prompt
from cluster.frontend.generation.sequence import RunningSequence, SamplingOptions, TextChunk, TokenText, token_text
from cluster.frontend.generation.token_offsets import offsets_in_prompt
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.frontend.openai_api.open_answers import OpenAnswers
from cluster.logs import log_event
from cluster.model.info import ModelInfo
from cluster.observability.metrics import FrontendMetrics
from cluster.protocols import AttentionWorkerClient
from cluster.types import FinishReason, GenerationRequest, RequestId

_ABORT_TIMEOUT_S = 5.0
_BYTES_A_TOKEN = 4  # of what is small: a token id costs about as much as its text


class GenerationService:
    """Validates, tokenises, streams from the worker, turns tokens into text, ends and counts sequences."""

    def __init__(
        self,
        worker: AttentionWorkerClient,
        tokenizer: Tokenizer,
        info: ModelInfo,
        config: FrontendConfig,
        metrics: FrontendMetrics,
        embed: Callable[[Sequence[int]], bytes] = lambda _: b"",
    ) -> None:
        """Args: embed: what a prompt means, for routing and statistics; no embedding where nobody asks."""
        self._worker = worker
        self._embed = embed
        self._tokenizer = tokenizer
        self._info = info
        self._timeout_s = config.request_timeout_s
        self._max_logprobs = config.max_logprobs
        self._config = config
        self._metrics = metrics
        self._deadlines: dict[RequestId, SequenceDeadline] = {}
        self.inputs = InputPool(
            threads=config.input_threads,
            max_waiting=config.max_input_queue,
            on_refusal=partial(metrics.count_rejection, "input_queue_full"),
        )
        self.answers = OpenAnswers()

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        kwargs: Mapping[str, object] | None = None,
        add_special_tokens: bool = False,
    ) -> tuple[int, ...]:
        """Prompt ids of a chat; as a rule the template writes the special tokens itself."""

        def encode() -> tuple[int, ...]:
            text = self._tokenizer.apply_chat_template(
                messages,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=continue_final_message,
                tools=tools,
                kwargs=kwargs,
            )
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

        return await self.inputs.run(encode)  # a template is a program: what it does with little may be much

    async def encode_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Prompt ids of plain text; long texts are encoded beside the event loop."""
        encode = partial(self._tokenizer.encode, text, add_special_tokens=add_special_tokens)
        return await self.inputs.run(lambda: tuple(encode()), num_bytes=len(text))

    async def decode(self, token_ids: Sequence[int], *, skip_special_tokens: bool = True) -> str:
        """Text of a prompt given as ids.

        Raises:
            InvalidRequest: a token id outside the vocabulary.
        """

        def decode() -> str:
            self._check_token_ids(token_ids, "tokens")
            return self._tokenizer.decode(token_ids, skip_special_tokens=skip_special_tokens)

        return await self.inputs.run(decode, num_bytes=_BYTES_A_TOKEN * len(token_ids))

    async def prompt_text(self, prompt_ids: Sequence[int]) -> str:
        """Text of a prompt, without a character that it leaves unfinished: that belongs to the answer."""
        text = await self.decode(prompt_ids)
        return text.removesuffix("\N{REPLACEMENT CHARACTER}") if self._tokenizer.unfinished_bytes(prompt_ids) else text

    async def prompt_offsets(self, prompt_ids: Sequence[int], text: str) -> list[int]:
        """The character of `text` at which each token of a prompt begins."""
        find = partial(offsets_in_prompt, self._tokenizer, prompt_ids, text)
        return await self.inputs.run(find, num_bytes=_BYTES_A_TOKEN * len(prompt_ids))

    @property
    def tokenizer_facts(self) -> Mapping[str, object]:
        """What the checkpoint says of its tokenizer."""
        return self._tokenizer.facts

    def token_text(self, token_id: int) -> TokenText:
        """One token of a prompt, without log-probability."""
        return token_text(self._tokenizer, token_id, 0.0)

    async def token_pieces(self, token_ids: Sequence[int]) -> list[str]:
        """What the vocabulary writes for each token id."""
        piece = self._tokenizer.token_piece
        return await self.inputs.run(
            lambda: [piece(token_id) for token_id in token_ids], num_bytes=_BYTES_A_TOKEN * len(token_ids)
        )

    def prepare(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        request_id: RequestId,
        *,
        choice: int = 0,
        prompt_param: str = "prompt",
        logprobs_param: str = "num_logprobs",
    ) -> GenerationRequest:
        """Check a prompt against the model and fill in what the client left open. Starts nothing.

        `request_id` must be unique among running sequences: the worker aborts by it. `prompt_param` is the name
        that errors give the prompt, `logprobs_param` that of `num_logprobs`.

        Raises:
            InvalidRequest: empty prompt, a token id outside the vocabulary, or options that contradict each other.
            ContextTooLong: the prompt, or the prompt plus max_tokens, exceeds the context; gives both numbers.
        """
        check_lengths(options, self._config)
        prompt_ids = truncated_prompt(prompt_ids, options, self._info.max_model_len)
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty; at least one token is needed", param=prompt_param)
        self._check_token_ids(prompt_ids, prompt_param)
        sampling = resolve_sampling(
            options,
            tokenizer=self._tokenizer,
            info=self._info,
            num_prompt=len(prompt_ids),
            prompt_param=prompt_param,
            max_logprobs=self._max_logprobs,
            logprobs_param=logprobs_param,
        )
        return GenerationRequest(
            request_id=request_id,
            prompt_ids=tuple(prompt_ids),
            sampling=sampling,
            choice=choice,
            only_scores=options.max_tokens == 0,
            embedding=self._embed(prompt_ids),
        )

    async def prepare_choices(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        answer_id: str,
        *,
        first_choice: int = 0,
        prompt_param: str = "prompt",
        logprobs_param: str = "num_logprobs",
    ) -> list[GenerationRequest]:
        """`prepare` for all `options.n` answers to one prompt; they differ in id and noise."""
        names = {"prompt_param": prompt_param, "logprobs_param": logprobs_param}
        prepare = partial(self.prepare, prompt_ids, options, RequestId(answer_id), **names)
        num_ids = len(prompt_ids) + len(options.allowed_token_ids) + len(options.logit_bias)
        num_bytes = _BYTES_A_TOKEN * num_ids + sum(map(len, options.bad_words))
        first = await self.inputs.run(prepare, num_bytes=num_bytes)
        choices = range(first_choice, first_choice + options.n)
        return [replace(first, request_id=RequestId(f"{answer_id}-{choice}"), choice=choice) for choice in choices]

    async def generate(
        self, prompt: str | Sequence[int], options: SamplingOptions, request_id: RequestId
    ) -> AsyncGenerator[TextChunk]:
        """`prepare` and `stream` in one, for callers with one prompt."""
        prompt_ids = await self.encode_text(prompt) if isinstance(prompt, str) else prompt
        stream = self.stream(self.prepare(prompt_ids, options, request_id))
        try:
            async for chunk in stream:
                yield chunk
        finally:
            await stream.aclose()

    async def stream_choices(
        self, requests: Sequence[GenerationRequest], *, timeout_s: float | None = None
    ) -> AsyncGenerator[tuple[int, TextChunk]]:
        """Run all sequences of one answer; their chunks as they come, with the place of their request.

        All are taken or all are refused: nothing is given out before the last one was taken, and the first error, and
        closing this iterator, end all of them.

        Raises:
            Overloaded, Unavailable, DeadlineExceeded: as `stream`.
        """
        untaken = set(range(len(requests)))
        streams = [
            self.stream(request, timeout_s=timeout_s, on_taken=partial(untaken.discard, place))
            for place, request in enumerate(requests)
        ]
        held: list[tuple[int, TextChunk]] = []
        chunks = interleave(streams)
        try:
            async for chunk in chunks:
                held.append(chunk)
                if untaken:
                    continue
                for ready in held:
                    yield ready
                held.clear()
        finally:
            await chunks.aclose()

    def abort_answers(self, names: Sequence[str]) -> frozenset[str]:
        """End the answers of those names that are being given here; the names that had a running sequence."""
        running = {name: [each for each in self.answers.sequences_of(name) if self.abort(each)] for name in names}
        return frozenset(name for name, sequence_ids in running.items() if sequence_ids)

    def abort(self, request_id: RequestId) -> bool:
        """End a running sequence: its stream gives what it has and finish reason abort. False if there is none."""
        deadline = self._deadlines.get(request_id)
        if deadline is not None:
            deadline.abort()
        return deadline is not None

    async def stream(
        self,
        request: GenerationRequest,
        *,
        timeout_s: float | None = None,
        on_taken: Callable[[], None] = lambda: None,
    ) -> AsyncGenerator[TextChunk]:
        """Run one sequence. Closing the iterator early (the client left) aborts it in the worker.

        `timeout_s` is the time the client gives it, where that is less than the configured one.
        `on_taken` is called when a worker has taken it, at the latest with its first token.

        Raises:
            Overloaded, Unavailable: the worker did not take it, or was lost.
            DeadlineExceeded: the request's time ran out; the sequence was aborted.
        """
        sequence = RunningSequence(request, self._tokenizer, self._info.eos_token_ids, self._metrics)
        allowed_s = self._timeout_s if timeout_s is None else min(timeout_s, self._timeout_s)
        deadline = SequenceDeadline(asyncio.get_running_loop().time() + allowed_s)
        self._deadlines[request.request_id] = deadline
        tokens = self._worker.generate(request)
        outcome = "abort"
        try:
            while (chunk := await deadline.next_chunk(tokens)) is not None:
                on_taken()
                if not chunk.token_ids and chunk.finish_reason is None:
                    continue
                if chunk.finish_reason is FinishReason.ABORT:
                    raise Unavailable("the sequence was stopped by the server; try again")
                text_chunk = sequence.take(chunk)
                if text_chunk.finish_reason is None:
                    yield text_chunk
                    continue
                outcome = str(text_chunk.finish_reason)
                if chunk.finish_reason is None:  # a stop string, of which the worker knows nothing
                    await self._abort(request.request_id)
                yield text_chunk
                return
            if deadline.is_aborted:
                on_taken()
                yield sequence.end(FinishReason.ABORT)
                return
            raise Unavailable("the attention worker ended the stream before the sequence was complete; try again")
        except Exception as error:
            outcome = "error"
            self._count_rejection(error)
            raise
        finally:
            self._deadlines.pop(request.request_id, None)
            if outcome in ("abort", "error"):
                await self._abort(request.request_id)
            if isinstance(tokens, AsyncGenerator):
                await tokens.aclose()
            sequence.count(outcome)

    def _check_token_ids(self, ids: Sequence[int], param: str) -> None:
        check_token_ids(ids, self._info.vocab_size or self._tokenizer.vocab_size, param)

    def _count_rejection(self, error: Exception) -> None:
        if isinstance(error, Overloaded):
            self._metrics.count_rejection("queue_full")
        elif isinstance(error, Unavailable):
            self._metrics.count_rejection("unavailable")

    async def _abort(self, request_id: RequestId) -> None:
        """Tell the worker to stop. A worker that cannot be told has stopped by itself or ends at max_tokens."""
        try:
            async with asyncio.timeout(_ABORT_TIMEOUT_S):
                await self._worker.abort(request_id)
        except (MoesaicError, ConnectionError, TimeoutError) as error:
            logger = logging.getLogger(__name__)
            log_event(logger, logging.WARNING, "abort not delivered", request_id=request_id, reason=repr(error))
