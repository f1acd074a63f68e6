"""The HTTP face: routes of the OpenAI API and of the operators. Knows FastAPI and shapes; no Ray, no tokens."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from importlib import metadata
from typing import TypeVar

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import Response

from cluster.config import FrontendConfig
from cluster.errors import ModelNotFound, MoesaicError, Unavailable
from cluster.frontend.choices import interleave
from cluster.frontend.generation import GenerationService
from cluster.frontend.http_errors import install_error_responses
from cluster.frontend.http_middleware import Admission, ApiKey, BodyLimit, RequestContext
from cluster.frontend.http_stream import EventStream, run_while_connected
from cluster.frontend.open_requests import OpenRequests
from cluster.frontend.openai_answers import DONE_EVENT, AnswerFormat, ChatAnswer, CompletionAnswer, total_usage
from cluster.frontend.openai_schema import ChatRequest, CompletionRequest, parse_body
from cluster.frontend.sequence import TextChunk, Usage
from cluster.model_info import ModelInfo
from cluster.observability.metrics import FrontendMetrics
from cluster.protocols import AttentionWorkerClient
from cluster.types import GenerationRequest, RequestId, StartupPhase

_GENERATION_PATHS = ("/v1/chat/completions", "/v1/completions")
_GUARDED_PATHS = ("/v1", "/experts", "/status")
_WORKER_TIMEOUT_S = 5.0

Answer = TypeVar("Answer")


def create_app(
    service: GenerationService,
    worker: AttentionWorkerClient,
    info: ModelInfo,
    config: FrontendConfig,
    metrics: FrontendMetrics,
) -> FastAPI:
    """Build the application. `app.state.requests` is its `OpenRequests`: `begin_drain()`, `num_in_flight`."""
    app = FastAPI(title="Moesaic", docs_url=None, redoc_url=None, openapi_url=None, redirect_slashes=False)
    requests = OpenRequests(metrics.set_in_flight)
    app.state.requests = requests
    openai = _OpenAIRoutes(service, info, config)
    operator = _OperatorRoutes(worker, requests, metrics)
    app.add_api_route("/v1/chat/completions", openai.chat, methods=["POST"])
    app.add_api_route("/v1/completions", openai.complete, methods=["POST"])
    app.add_api_route("/v1/models", openai.list_models, methods=["GET"])
    app.add_api_route("/v1/models/{model:path}", openai.show_model, methods=["GET"])
    app.add_api_route("/health", operator.health, methods=["GET"])
    app.add_api_route("/ready", operator.ready, methods=["GET"])
    app.add_api_route("/metrics", operator.metrics_text, methods=["GET"])
    app.add_api_route("/experts", operator.experts, methods=["GET"])
    app.add_api_route("/status", operator.status, methods=["GET"])
    app.add_api_route("/version", operator.version, methods=["GET"])
    install_error_responses(app)
    # The last one added sees a request first.
    app.add_middleware(Admission, requests=requests, paths=_GENERATION_PATHS, metrics=metrics)
    app.add_middleware(BodyLimit, max_bytes=config.max_body_bytes)
    if config.api_key is not None:
        app.add_middleware(ApiKey, key=config.api_key.get_secret_value(), guarded=_GUARDED_PATHS)
    app.add_middleware(
        RequestContext, metrics=metrics, routes=[*_GENERATION_PATHS, "/v1/models", "/experts", "/status"]
    )
    return app


class _OpenAIRoutes:
    """Routes below /v1."""

    def __init__(self, service: GenerationService, info: ModelInfo, config: FrontendConfig) -> None:
        self._service = service
        self._info = info
        self._keep_alive_s = config.keep_alive_s
        self._created_s = int(time.time())

    async def chat(self, request: Request) -> Response:
        """POST /v1/chat/completions"""
        body = parse_body(ChatRequest, await request.body())
        self._check_model(body.model)
        prompt_ids = await self._service.encode_chat(
            [message.for_template() for message in body.messages],
            add_generation_prompt=body.add_generation_prompt,
            kwargs=body.chat_template_kwargs,
        )
        answer_id = _new_answer_id(request, "chatcmpl")
        sequences = [self._service.prepare(prompt_ids, body.options(), RequestId(answer_id), prompt_param="messages")]
        answer = ChatAnswer(
            answer_id=answer_id,
            model=self._info.name,
            created_s=int(time.time()),
            include_usage=body.include_usage,
        )
        return await self._answer(request, sequences, answer, body)

    async def complete(self, request: Request) -> Response:
        """POST /v1/completions"""
        body = parse_body(CompletionRequest, await request.body())
        self._check_model(body.model)
        answer_id = _new_answer_id(request, "cmpl")
        sequences: list[GenerationRequest] = []
        echoes: list[str] = []
        for choice, prompt in enumerate(body.prompt):
            prompt_ids = await self._service.encode_text(prompt) if isinstance(prompt, str) else prompt
            request_id = RequestId(f"{answer_id}-{choice}")
            sequences.append(self._service.prepare(prompt_ids, body.options(), request_id, choice=choice))
            text = prompt if isinstance(prompt, str) or not body.echo else self._service.decode(prompt)
            echoes.append(text if body.echo and isinstance(text, str) else "")
        answer = CompletionAnswer(
            answer_id=answer_id,
            model=self._info.name,
            created_s=int(time.time()),
            include_usage=body.include_usage,
            echoes=echoes,
        )
        return await self._answer(request, sequences, answer, body)

    async def list_models(self) -> Response:
        """GET /v1/models"""
        return _json({"object": "list", "data": [self._model_json()]})

    async def show_model(self, model: str) -> Response:
        """GET /v1/models/{model}"""
        self._check_model(model)
        return _json(self._model_json())

    async def _answer(
        self,
        request: Request,
        sequences: Sequence[GenerationRequest],
        answer: AnswerFormat,
        body: ChatRequest | CompletionRequest,
    ) -> Response:
        streams = [self._service.stream(sequence) for sequence in sequences]
        if body.stream:
            events = _events(streams, answer, include_usage=body.include_usage)
            return EventStream(events, keep_alive_s=self._keep_alive_s, request_id=request.state.request_id)
        collected = await run_while_connected(_collect(streams, answer), request.receive)
        if collected is None:
            return Response(status_code=499)  # nobody reads it; the log does
        return Response(collected, media_type="application/json")

    def _check_model(self, name: str) -> None:
        if name != self._info.name:
            message = f"the model {name[:200]!r} does not exist; this server has {self._info.name!r}"
            raise ModelNotFound(message, param="model", code="model_not_found")

    def _model_json(self) -> dict[str, object]:
        return {
            "id": self._info.name,
            "object": "model",
            "created": self._created_s,
            "owned_by": "moesaic",
            "max_model_len": self._info.max_model_len,
        }


class _OperatorRoutes:
    """Routes for probes, dashboards and the command line."""

    def __init__(self, worker: AttentionWorkerClient, requests: OpenRequests, metrics: FrontendMetrics) -> None:
        self._worker = worker
        self._requests = requests
        self._metrics = metrics

    async def health(self) -> Response:
        """GET /health: the process lives."""
        return _json({"status": "ok"})

    async def ready(self) -> Response:
        """GET /ready: requests would be answered; otherwise 503 with the start-up phase."""
        try:
            status = await self._worker_answer(self._worker.status())
            phase, error = status.phase, status.error
        except MoesaicError as failure:
            phase, error = StartupPhase.FAILED, failure.message
        if self._requests.draining:
            phase = StartupPhase.DRAINING
        is_ready = phase is StartupPhase.READY
        headers = {} if is_ready else {"Retry-After": "2"}
        return _json({"phase": phase, "error": error}, 200 if is_ready else 503, headers)

    async def metrics_text(self) -> Response:
        """GET /metrics: ours and the worker's."""
        try:
            workers = await self._worker_answer(self._worker.metrics_text())
        except MoesaicError as failure:
            workers = f"# {failure.message}\n"
        return Response(self._metrics.text() + workers, headers={"Content-Type": self._metrics.content_type})

    async def experts(self) -> Response:
        """GET /experts: residency and activation by layer."""
        status = await self._worker_answer(self._worker.status())
        report = await self._worker_answer(self._worker.experts())
        worker = {"worker_id": report.worker_id, "memory": status.expert_memory, "layers": report.layers}
        return _json({"workers": [worker]})

    async def status(self) -> Response:
        """GET /status: what the workers say of themselves."""
        workers = [await self._worker_answer(self._worker.status())]
        facts = {"draining": self._requests.draining, "num_in_flight": self._requests.num_in_flight}
        return _json({"workers": workers, **facts})

    async def version(self) -> Response:
        """GET /version"""
        try:
            version = metadata.version("moesaic")
        except metadata.PackageNotFoundError:  # run from a checkout
            version = "unknown"
        return _json({"version": version})

    async def _worker_answer(self, call: Awaitable[Answer]) -> Answer:
        try:
            async with asyncio.timeout(_WORKER_TIMEOUT_S):
                return await call
        except (ConnectionError, TimeoutError) as error:
            raise Unavailable(f"the attention worker does not answer ({type(error).__name__})") from error


async def _events(
    streams: Sequence[AsyncGenerator[TextChunk]], answer: AnswerFormat, *, include_usage: bool
) -> AsyncGenerator[bytes]:
    """Server-sent events of one answer; the first comes with the first chunk."""
    chunks = interleave(streams)
    opened: set[int] = set()
    usages: list[Usage] = []
    try:
        async for index, chunk in chunks:
            event = answer.event(index, chunk)
            if index not in opened:
                opened.add(index)
                event = answer.opening_event(index) + event
            if chunk.usage is not None:
                usages.append(chunk.usage)
            if event:
                yield event
        if include_usage:
            yield answer.usage_event(total_usage(usages))
        yield DONE_EVENT
    finally:
        await chunks.aclose()


async def _collect(streams: Sequence[AsyncGenerator[TextChunk]], answer: AnswerFormat) -> bytes:
    """The whole answer."""
    choices: list[list[TextChunk]] = [[] for _ in streams]
    chunks = interleave(streams)
    try:
        async for index, chunk in chunks:
            choices[index].append(chunk)
    finally:
        await chunks.aclose()
    usages = [chunk.usage for chunks_of_choice in choices for chunk in chunks_of_choice if chunk.usage is not None]
    return answer.body(choices, total_usage(usages))


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value), status, headers, "application/json")


def _new_answer_id(request: Request, prefix: str) -> str:
    """An id of our own, which the worker knows the sequence by; the log has it beside the client's request id."""
    answer_id = f"{prefix}-{uuid.uuid4().hex}"
    request.state.answer_id = answer_id
    return answer_id
