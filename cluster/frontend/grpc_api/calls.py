"""What surrounds every gRPC call: key, id, deadline, admission, errors and one log line. Knows no message.

The counterpart of `http_middleware.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
import uuid
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from typing import Any, TypeAlias, TypeVar, cast

import grpc
from grpc_status import rpc_status

from cluster.errors import DeadlineExceeded, MoesaicError, Unavailable
from cluster.frontend.grpc_api.convert import field_path
from cluster.frontend.grpc_api.errors import status_of
from cluster.frontend.http.open_requests import OpenRequests
from cluster.frontend.http.request_id import choose_request_id
from cluster.frontend.security.api_keys import Keys, Level, presented_keys
from cluster.logs import log_event
from cluster.observability.metrics import FrontendMetrics

REQUEST_ID_KEY = "x-request-id"
IGNORED_FIELDS_KEY = "x-moesaic-ignored-fields"

_OPERATOR_PREFIX = "/moesaic.v1.ClusterService/"
_HEALTH_PREFIX = "/grpc.health.v1.Health/"

Answer = TypeVar("Answer")
Context = grpc.aio.ServicerContext[Any, Any]
Handler: TypeAlias = "grpc.RpcMethodHandler[Any, Any]"


@dataclass(frozen=True, slots=True)
class Call:
    """A call that was let in. `answer_id` is ours and unique, for the worker; `timeout_s` is what it may take.

    `request_id` is the client's, or what it was told. `ignored_fields` is filled while the request is read.
    """

    answer_id: str
    request_id: str
    timeout_s: float
    ignored_fields: list[str] = field(default_factory=list[str])


class ApiKeyInterceptor(grpc.aio.ServerInterceptor):
    """Lets calls through only with the right key; health stays open, because probes send none."""

    def __init__(self, keys: Keys) -> None:
        self._keys = keys

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[Handler | None]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Handler | None:
        """The handler of the call if its key is right, else one that refuses it."""
        method = str(handler_call_details.method)
        if method.startswith(_HEALTH_PREFIX):
            return await continuation(handler_call_details)
        presented = _presented_keys(handler_call_details.invocation_metadata)
        level = Level.OPERATOR_READS if method.startswith(_OPERATOR_PREFIX) else Level.CLIENT
        how = "metadata 'authorization: Bearer KEY' or 'x-api-key: KEY'"
        error = self._keys.refusal(level, presented, how)
        return await continuation(handler_call_details) if error is None else _refusing(error)


class Calls:
    """Lets calls in, bounds their time, and turns what goes wrong in them into rich statuses."""

    def __init__(self, requests: OpenRequests, metrics: FrontendMetrics, *, timeout_s: float) -> None:
        self._requests = requests
        self._metrics = metrics
        self._timeout_s = timeout_s

    async def answer(self, context: Context, method: str, work: Callable[[Call], Awaitable[Answer]]) -> Answer:
        """Do the work of one call; errors in it end the call with their status, time running out cancels it.

        Args:
            method: its name, for the log.
        """
        request_id = choose_request_id(_metadata_value(context.invocation_metadata(), REQUEST_ID_KEY))
        named = ((REQUEST_ID_KEY, request_id),)
        context.set_trailing_metadata(named)
        call = Call(f"gen-{uuid.uuid4().hex}", request_id, self._allowed_s(context))
        code, started_s = "CANCELLED", time.perf_counter()  # stays so when the client leaves or stops waiting
        try:
            result = await _within(call.timeout_s, work(call))
            context.set_trailing_metadata((*named, *_ignored(call)))
            code = "OK"
            return result
        except Exception as error:  # noqa: BLE001 - a top loop: logs bugs with traceback, answers, goes on
            status = grpc_status_of(error)
            code = status.code.name
            if status.code is grpc.StatusCode.INTERNAL:
                log_event(_logger(), logging.ERROR, "request failed", error=error, request_id=request_id)
            trailers = (*named, *_ignored(call), *(status.trailing_metadata or ()))
            await context.abort(status.code, status.details, trailers)
        finally:
            log_event(
                _logger(),
                logging.INFO,
                "request answered",
                request_id=request_id,
                answer_id=call.answer_id,
                method=method,
                code=code,
                duration_s=time.perf_counter() - started_s,
            )

    async def generate(self, context: Context, method: str, work: Callable[[Call], Awaitable[Answer]]) -> Answer:
        """`answer` for a generation request: counted while it lasts, and refused while draining."""

        async def admitted(call: Call) -> Answer:
            if self._requests.draining:
                self._metrics.count_rejection("draining")
                raise Unavailable("the server is shutting down and takes no new requests; try again later")
            with self._requests.counted():
                return await work(call)

        return await self.answer(context, method, admitted)

    def _allowed_s(self, context: Context) -> float:
        """Seconds until the client's deadline, or ours where that comes first."""
        remaining_s = cast("float | None", context.time_remaining())
        return self._timeout_s if remaining_s is None else min(remaining_s, self._timeout_s)


def grpc_status_of(error: BaseException) -> grpc.Status:
    """The status of an error with its details, as the library sends it."""
    convert = cast("Callable[[object], grpc.Status]", rpc_status.to_status)  # pyright: ignore[reportUnknownMemberType]
    return convert(status_of(error, field_of=field_path))


async def _within(timeout_s: float, work: Awaitable[Answer]) -> Answer:
    """Everything counts: tokenising, generating, and a client that does not read.

    Raises:
        DeadlineExceeded: the time ran out; `work` was cancelled.
    """
    limit = asyncio.timeout(timeout_s)
    try:
        async with limit:
            return await work
    except TimeoutError as error:
        if not limit.expired():
            raise
        raise DeadlineExceeded(f"the request's time ran out after {timeout_s:.3f} s; it was stopped") from error


def _refusing(error: MoesaicError) -> Handler:
    """A handler that ends every call with an error, whatever its arity."""

    async def refuse(_requests: object, context: Context) -> None:
        await context.abort_with_status(grpc_status_of(error))

    return grpc.stream_stream_rpc_method_handler(refuse)


def _ignored(call: Call) -> tuple[tuple[str, str], ...]:
    return ((IGNORED_FIELDS_KEY, ", ".join(call.ignored_fields)),) if call.ignored_fields else ()


def _presented_keys(metadata: object) -> tuple[str, ...]:
    return presented_keys(_metadata_value(metadata, "authorization"), _metadata_value(metadata, "x-api-key"))


def _metadata_value(metadata: object, key: str) -> str:
    """The first text value of `key`, or nothing."""
    pairs: Any = metadata or ()
    return next((value for name, value in pairs if name == key and isinstance(value, str)), "")


def _logger() -> logging.Logger:
    return logging.getLogger(__name__)
