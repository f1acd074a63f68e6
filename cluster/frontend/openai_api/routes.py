"""Routes of the OpenAI API, and the one that stops its answers. Knows shapes and FastAPI; no tokens, no workers."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncGenerator, Sequence
from typing import NamedTuple

import orjson
from starlette.requests import Request
from starlette.responses import Response

from cluster.config.sections import FrontendConfig
from cluster.errors import ModelNotFound
from cluster.frontend.generation.sequence import TextChunk, Usage
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.http.body import read_body
from cluster.frontend.http.stream import EventStream, run_while_connected
from cluster.frontend.openai_api.answer_facts import AnswerFacts
from cluster.frontend.openai_api.answers import DONE_EVENT, AnswerFormat, ChatAnswer, CompletionAnswer
from cluster.frontend.openai_api.logprobs import Echo
from cluster.frontend.openai_api.sampling import SamplingFields
from cluster.frontend.openai_api.schema import AbortRequest, ChatRequest, CompletionRequest
from cluster.model.info import ModelInfo
from cluster.protocols import FrontEnds
from cluster.types import GenerationRequest


class _Answer(NamedTuple):
    """One answer to be: its names, its sequences and its shape."""

    names: tuple[str, ...]
    sequences: Sequence[GenerationRequest]
    shape: AnswerFormat


class OpenAIRoutes:
    """Routes below /v1, and /abort_requests."""

    def __init__(
        self,
        service: GenerationService,
        info: ModelInfo,
        config: FrontendConfig,
        peers: FrontEnds | None = None,
    ) -> None:
        """Args: peers: the other front ends, for what may be given by any of them; None: there are none."""
        self._service = service
        self._info = info
        self._config = config
        self._created_s = int(time.time())
        self._peers = peers

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = await read_body(request, ChatRequest)
        check_model(body.model, self._info)
        prompt_ids = await self._service.encode_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.opens_answer,
            continue_final_message=bool(body.continue_final_message),
            tools=body.tools,
            kwargs=body.chat_template_kwargs,
            add_special_tokens=body.add_special_tokens,
        )
        answer_id = _new_answer_id(request, "chatcmpl")
        sequences = await self._service.prepare_choices(
            prompt_ids, body.options(), answer_id, prompt_param="messages", logprobs_param="top_logprobs"
        )
        shape = ChatAnswer(self._facts(answer_id, body, sequences), echo=body.echoed)
        return await self._respond(request, _Answer(_names(request, answer_id, body), sequences, shape), body)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions"""
        body = await read_body(request, CompletionRequest)
        check_model(body.model, self._info)
        answer_id = _new_answer_id(request, "cmpl")
        options = body.options()
        sequences: list[GenerationRequest] = []
        echoes: list[Echo] = []
        for prompt in body.prompt:
            prompt_ids: Sequence[int] = (
                await self._service.encode_text(prompt, add_special_tokens=body.add_special_tokens)
                if isinstance(prompt, str)
                else prompt
            )
            choices = await self._service.prepare_choices(
                prompt_ids, options, answer_id, first_choice=len(sequences), logprobs_param="logprobs"
            )
            sequences += choices
            if body.echo:
                kept = choices[0].prompt_ids  # fewer than the prompt has when it is truncated
                is_whole = len(kept) == len(prompt_ids)
                text = prompt if isinstance(prompt, str) and is_whole else await self._service.prompt_text(kept)
                offsets = [] if body.logprobs is None else await self._service.prompt_offsets(kept, text)
                echoes.append(Echo(text, self._service.token_text(kept[0]), offsets))
        shape = CompletionAnswer(
            self._facts(answer_id, body, sequences),
            echoes=echoes,
            gives_prompt_logprobs=body.prompt_logprobs is not None,
        )
        return await self._respond(request, _Answer(_names(request, answer_id, body), sequences, shape), body)

    async def list_models(self) -> Response:
        """GET /v1/models"""
        return json_response({"object": "list", "data": [self._model_json()]})

    async def show_model(self, model: str) -> Response:
        """GET /v1/models/{model}"""
        check_model(model, self._info)
        return json_response(self._model_json())

    async def abort(self, request: Request) -> Response:
        """POST /abort_requests: the answers named end with what they have and finish reason abort.

        Whichever front end gives them; those that did not say in time are counted.
        """
        body = await read_body(request, AbortRequest)
        aborted = self._service.abort_answers(body.request_ids)
        num_silent = 0
        if self._peers is not None:
            elsewhere, num_silent = await self._peers.abort_answers(tuple(body.request_ids))
            aborted |= elsewhere
        names = [name for name in dict.fromkeys(body.request_ids) if name in aborted]
        silent = {"silent_front_ends": num_silent} if num_silent else {}
        return json_response({"aborted": names, **silent})

    async def _respond(self, request: Request, answer: _Answer, body: SamplingFields) -> Response:
        if body.stream:
            events = self._events(answer)
            return EventStream(events, keep_alive_s=self._config.keep_alive_s, request_id=request.state.request_id)
        collected = await run_while_connected(self._collect(answer), request.receive)
        if collected is None:
            return Response(status_code=499)  # nobody reads it; the log does
        return Response(collected, media_type="application/json")

    async def _events(self, answer: _Answer) -> AsyncGenerator[bytes]:
        """Server-sent events of one answer; the first comes with the first chunk."""
        shape = answer.shape
        opened: set[int] = set()
        usages: dict[int, Usage] = {}
        with self._service.answers.listed(answer.names, [sequence.request_id for sequence in answer.sequences]):
            chunks = self._service.stream_choices(answer.sequences)
            try:
                async for index, chunk in chunks:
                    opening = b"" if index in opened else shape.opening_event(index, chunk)
                    opened.add(index)
                    event = opening + shape.event(index, chunk)
                    if chunk.usage is not None:
                        usages[index] = chunk.usage
                    if event:
                        yield event
                if shape.facts.include_usage:
                    yield shape.usage_event(shape.facts.total_usage(usages))
                yield DONE_EVENT
            finally:
                await chunks.aclose()

    async def _collect(self, answer: _Answer) -> bytes:
        """The whole answer."""
        choices: list[list[TextChunk]] = [[] for _ in answer.sequences]
        usages: dict[int, Usage] = {}
        with self._service.answers.listed(answer.names, [sequence.request_id for sequence in answer.sequences]):
            chunks = self._service.stream_choices(answer.sequences)
            try:
                async for index, chunk in chunks:
                    choices[index].append(chunk)
                    if chunk.usage is not None:
                        usages[index] = chunk.usage
            finally:
                await chunks.aclose()
        return answer.shape.body(choices, answer.shape.facts.total_usage(usages))

    def _facts(self, answer_id: str, body: SamplingFields, sequences: Sequence[GenerationRequest]) -> AnswerFacts:
        n = body.n or 1
        return AnswerFacts(
            answer_id=answer_id,
            model=self._info.name,
            fingerprint=f"fp_{self._info.fingerprint}",
            created_s=int(time.time()),
            prompts=[sequence.prompt_ids for sequence in sequences[::n]],
            n=n,
            include_usage=body.include_usage or self._config.force_include_usage,
            continuous_usage=body.continuous_usage or self._config.force_include_usage,
            gives_token_ids=bool(body.return_token_ids),
            gives_metrics=self._config.per_request_metrics,
            names_token_ids=bool(body.return_tokens_as_token_ids) or self._config.return_tokens_as_token_ids,
        )

    def _model_json(self) -> dict[str, object]:
        return {
            "id": self._info.name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "moesaic",
            "root": self._info.name,
            "parent": None,
            "max_model_len": self._info.max_model_len,
            "permission": [
                {
                    "id": f"modelperm-{self._info.fingerprint}",
                    "object": "model_permission",
                    "created": self._created_s,
                    "allow_create_engine": False,
                    "allow_sampling": True,
                    "allow_logprobs": True,
                    "allow_search_indices": False,
                    "allow_view": True,
                    "allow_fine_tuning": False,
                    "organization": "*",
                    "group": None,
                    "is_blocking": False,
                }
            ],
        }


def check_model(name: str | None, info: ModelInfo) -> None:
    """Return if this server has that model; no name means the one that it has.

    Raises:
        ModelNotFound: it has another one.
    """
    if name not in (None, info.name):
        message = f"the model {str(name)[:200]!r} does not exist; this server has {info.name!r}"
        raise ModelNotFound(message, param="model", code="model_not_found")


def json_response(value: object) -> Response:
    """200 with `value` as JSON."""
    return Response(orjson.dumps(value), media_type="application/json")


def _new_answer_id(request: Request, prefix: str) -> str:
    """An id of our own, from which the worker's ids are made; the log has it beside the client's request id."""
    answer_id = f"{prefix}-{uuid.uuid4().hex}"
    request.state.answer_id = answer_id
    return answer_id


def _names(request: Request, answer_id: str, body: SamplingFields) -> tuple[str, ...]:
    """What a client may call its answer."""
    names = (answer_id, request.state.request_id)
    return names if body.request_id is None else (*names, body.request_id)
