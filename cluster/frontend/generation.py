"""The one place where HTTP, gRPC and the command line end: prompt in, text out.

Knows tokens, stop strings, limits and deadlines; knows no transport and not how the worker computes.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence

from cluster.config import FrontendConfig
from cluster.errors import ContextTooLong, DeadlineExceeded, InvalidRequest, MoesaicError, Overloaded, Unavailable
from cluster.frontend.sequence import RunningSequence, SamplingOptions, TextChunk
from cluster.frontend.tokenizer import Tokenizer
from cluster.model_info import ModelInfo
from cluster.observability.logs import log_event
from cluster.observability.metrics import FrontendMetrics
from cluster.protocols import AttentionWorkerClient
from cluster.types import FinishReason, GenerationRequest, RequestId, SamplingParams, TokenChunk

_ABORT_TIMEOUT_S = 5.0
_LONG_TEXT_CHARS = 16_384


class GenerationService:
    """Validates, tokenises, streams from the worker, turns tokens into text, ends and counts sequences."""

    def __init__(
        self,
        worker: AttentionWorkerClient,
        tokenizer: Tokenizer,
        info: ModelInfo,
        config: FrontendConfig,
        metrics: FrontendMetrics,
    ) -> None:
        self._worker = worker
        self._tokenizer = tokenizer
        self._info = info
        self._timeout_s = config.request_timeout_s
        self._metrics = metrics

    async def encode_chat(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, object] | None = None,
    ) -> tuple[int, ...]:
        """Prompt ids of a chat; the template writes the special tokens itself."""
        text = self._tokenizer.apply_chat_template(messages, add_generation_prompt=add_generation_prompt, kwargs=kwargs)
        return await self.encode_text(text, add_special_tokens=False)

    async def encode_text(self, text: str, *, add_special_tokens: bool = True) -> tuple[int, ...]:
        """Prompt ids of plain text; long texts are encoded beside the event loop."""
        if len(text) < _LONG_TEXT_CHARS:
            return tuple(self._tokenizer.encode(text, add_special_tokens=add_special_tokens))
        return tuple(await asyncio.to_thread(self._tokenizer.encode, text, add_special_tokens=add_special_tokens))

    def decode(self, token_ids: Sequence[int]) -> str:
        """Text of a prompt given as ids (for `echo`)."""
        return self._tokenizer.decode(token_ids)

    def prepare(
        self,
        prompt_ids: Sequence[int],
        options: SamplingOptions,
        request_id: RequestId,
        *,
        choice: int = 0,
        prompt_param: str = "prompt",
    ) -> GenerationRequest:
        """Check a prompt against the model and fill in what the client left open. Starts nothing.

        `request_id` must be unique among running sequences: the worker aborts by it. `prompt_param` is the name
        that errors give the prompt.

        Raises:
            InvalidRequest: empty prompt, or a token id outside the vocabulary.
            ContextTooLong: the prompt, or the prompt plus max_tokens, exceeds the context; gives both numbers.
        """
        if not prompt_ids:
            raise InvalidRequest("the prompt is empty; at least one token is needed", param=prompt_param)
        self._check_token_ids(prompt_ids, prompt_param)
        self._check_token_ids(options.stop_token_ids, "stop_token_ids")
        max_tokens = self._max_tokens(len(prompt_ids), options.max_tokens, prompt_param)
        if options.min_tokens > max_tokens:
            raise InvalidRequest(
                f"min_tokens ({options.min_tokens}) exceeds the tokens that can be generated ({max_tokens})",
                param="min_tokens",
            )
        seed = secrets.randbits(63) if options.seed is None else options.seed % 2**63
        sampling = SamplingParams(
            max_tokens=max_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            top_k=options.top_k,
            min_p=options.min_p,
            seed=seed,
            min_tokens=options.min_tokens,
            stop=options.stop,
            stop_token_ids=options.stop_token_ids,
            ignore_eos=options.ignore_eos,
            num_logprobs=options.num_logprobs,
        )
        return GenerationRequest(request_id=request_id, prompt_ids=tuple(prompt_ids), sampling=sampling, choice=choice)

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

    async def stream(self, request: GenerationRequest) -> AsyncGenerator[TextChunk]:
        """Run one sequence. Closing the iterator early (the client left) aborts it in the worker.

        Raises:
            Overloaded, Unavailable: the worker did not take it, or was lost.
            DeadlineExceeded: the request's time ran out; the sequence was aborted.
        """
        sequence = RunningSequence(request, self._tokenizer, self._info.eos_token_ids, self._metrics)
        deadline_s = asyncio.get_running_loop().time() + self._timeout_s
        tokens = self._worker.generate(request)
        outcome = "abort"
        try:
            while (chunk := await _next_chunk(tokens, deadline_s)) is not None:
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
            raise Unavailable("the attention worker ended the stream before the sequence was complete; try again")
        except Exception as error:
            outcome = "error"
            self._count_rejection(error)
            raise
        finally:
            if outcome in ("abort", "error"):
                await self._abort(request.request_id)
            if isinstance(tokens, AsyncGenerator):
                await tokens.aclose()
            sequence.count(outcome)

    def _check_token_ids(self, ids: Sequence[int], param: str) -> None:
        limit = self._info.vocab_size or self._tokenizer.vocab_size
        if ids and not (min(ids) >= 0 and max(ids) < limit):
            wrong = next(token_id for token_id in ids if not 0 <= token_id < limit)
            raise InvalidRequest(f"token id {wrong} is outside the vocabulary of {limit} tokens", param=param)

    def _max_tokens(self, num_prompt: int, max_tokens: int | None, prompt_param: str) -> int:
        context = self._info.max_model_len
        too_long = f"this model's maximum context length is {context} tokens, but "
        code = "context_length_exceeded"
        if num_prompt >= context:
            raise ContextTooLong(
                f"{too_long}the prompt has {num_prompt} tokens; at most {context - 1} leave room for an answer",
                param=prompt_param,
                code=code,
            )
        if max_tokens is None:
            return context - num_prompt
        if max_tokens < 1:
            raise InvalidRequest(f"max_tokens must be at least 1, got {max_tokens}", param="max_tokens")
        if num_prompt + max_tokens > context:
            raise ContextTooLong(
                f"{too_long}{num_prompt + max_tokens} were requested ({num_prompt} in the prompt, {max_tokens} in the "
                "completion); shorten the prompt or lower max_tokens",
                param="max_tokens",
                code=code,
            )
        return max_tokens

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


async def _next_chunk(tokens: AsyncIterator[TokenChunk], deadline_s: float) -> TokenChunk | None:
    """The next chunk, or None when there are no more.

    Raises:
        DeadlineExceeded: it did not come before `deadline_s` on the loop's clock.
    """
    try:
        async with asyncio.timeout_at(deadline_s):
            return await anext(tokens, None)
    except TimeoutError as error:
        raise DeadlineExceeded("the request's time ran out; it was stopped (frontend.request_timeout_s)") from error
