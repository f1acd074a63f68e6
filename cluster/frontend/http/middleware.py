"""What happens to every request before a route sees it: id, key, size, admission. Pure ASGI, no routes."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable, Mapping

from starlette.datastructures import Headers, MutableHeaders
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import BodyTooLarge, Overloaded, PermissionDenied, Unavailable
from cluster.frontend.http.errors import error_response
from cluster.frontend.http.open_requests import OpenRequests
from cluster.frontend.http.request_id import choose_request_id
from cluster.frontend.http.route_path import route_path
from cluster.frontend.security.api_keys import Keys, Level, presented_keys
from cluster.frontend.security.cross_site import CrossSite
from cluster.logs import log_event
from cluster.observability.metrics import FrontendMetrics

_KEY_HEADERS = ("authorization", "x-api-key")
IGNORED_FIELDS_HEADER = "x-moesaic-ignored-fields"

_PROBES = ("/health", "/ready", "/metrics")


class RequestContext:
    """Names each request, counts and logs its answer, and turns a bug into a 500 with the traceback in the log."""

    def __init__(self, app: ASGIApp, *, metrics: FrontendMetrics, routes: Iterable[str]) -> None:
        """`routes` are the fixed paths, for answers that were given before a route was found."""
        self._app = app
        self._metrics = metrics
        self._routes = frozenset(routes)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        request_id = choose_request_id(Headers(scope=scope).get("x-request-id"))
        scope.setdefault("state", {})["request_id"] = request_id
        status = 499  # stays so when the client leaves before the answer
        started_s = time.perf_counter()

        async def send_with_id(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = int(message["status"])
                headers = MutableHeaders(scope=message)
                headers["x-request-id"] = request_id
                if ignored := scope["state"].get("ignored_fields"):
                    headers[IGNORED_FIELDS_HEADER] = ", ".join(ignored)
            await send(message)

        try:
            await self._app(scope, receive, send_with_id)
        except ClientDisconnect:
            log_event(_logger(), logging.DEBUG, "client left before its request was whole", request_id=request_id)
        except Exception as error:  # noqa: BLE001 - a top loop: logs with traceback, answers, goes on
            log_event(_logger(), logging.ERROR, "request failed", error=error, request_id=request_id)
            if status == 499:
                await error_response(error)(scope, receive, send_with_id)
        finally:
            self._record(scope, status, time.perf_counter() - started_s, request_id)

    def _record(self, scope: Scope, status: int, duration_s: float, request_id: str) -> None:
        path = route_path(scope)
        route = getattr(scope.get("route"), "path", path if path in self._routes else "other")
        self._metrics.count_http(route=route, code=status)
        level = logging.DEBUG if route in _PROBES else logging.INFO
        log_event(
            _logger(),
            level,
            "request answered",
            request_id=request_id,
            answer_id=scope["state"].get("answer_id", "-"),
            method=scope["method"],
            route=route,
            code=status,
            duration_s=duration_s,
        )


class ApiKey:
    """Lets guarded paths through only with the right key."""

    def __init__(self, app: ASGIApp, *, keys: Keys, guarded: Mapping[Level, Iterable[str]]) -> None:
        """Args: guarded: paths by who may use them; of several that fit, the last counts."""
        self._app = app
        self._keys = keys
        self._guarded = {level: tuple(paths) for level, paths in guarded.items()}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        levels = [level for level, paths in self._guarded.items() if _is_below(route_path(scope), paths)]
        if not levels:
            return await self._app(scope, receive, send)
        headers = Headers(scope=scope)
        # Starlette reads header bytes as Latin-1; keys are UTF-8.
        values = [headers.get(name, "").encode("latin-1").decode(errors="replace") for name in _KEY_HEADERS]
        how = "'Authorization: Bearer KEY' or 'X-Api-Key: KEY'"
        error = self._keys.refusal(levels[-1], presented_keys(*values), how)
        if error is None:
            return await self._app(scope, receive, send)
        await error_response(error)(scope, receive, send)


class SameSite:
    """Keeps pages of other sites from using a person's browser on operator routes."""

    def __init__(self, app: ASGIApp, *, allowed: CrossSite, paths: Iterable[str], changing: Iterable[str]) -> None:
        """Args: changing: those of the paths that take a body, by POST."""
        self._app = app
        self._allowed = allowed
        self._paths = tuple(paths)
        self._changing = frozenset(changing)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _is_below(route_path(scope), self._paths):
            return await self._app(scope, receive, send)
        # A form can send a POST; before any other method that changes something browsers ask.
        changes = scope["method"] == "POST" and route_path(scope) in self._changing
        reason = self._allowed.reason(Headers(scope=scope), changes=changes)
        if reason is None:
            return await self._app(scope, receive, send)
        await error_response(PermissionDenied(reason, code="cross_site"))(scope, receive, send)


class BodyLimit:
    """Refuses bodies above a size, by their declared length or, without one, while they arrive.

    All that are still arriving have a bound too: above it the one that grows is refused.
    """

    def __init__(self, app: ASGIApp, *, max_bytes: int, max_arriving_bytes: int) -> None:
        self._app = app
        self._max_bytes = max_bytes
        self._max_arriving = max_arriving_bytes
        self._arriving = 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        declared = Headers(scope=scope).get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > self._max_bytes:
            return await error_response(self._error())(scope, receive, send)
        num_bytes = arriving = 0

        async def receive_counted() -> Message:
            nonlocal num_bytes, arriving
            message = await receive()
            size = len(message.get("body", b""))
            num_bytes, arriving, self._arriving = num_bytes + size, arriving + size, self._arriving + size
            if num_bytes > self._max_bytes:
                raise self._error()
            if self._arriving > self._max_arriving:
                limit = f"{self._max_arriving} bytes of requests are arriving (frontend.max_arriving_bytes)"
                raise Overloaded(f"{limit}; try again later")
            if not message.get("more_body", False):
                self._arriving, arriving = self._arriving - arriving, 0
            return message

        try:
            await self._app(scope, receive_counted, send)
        finally:
            self._arriving -= arriving

    def _error(self) -> BodyTooLarge:
        return BodyTooLarge(f"the request body exceeds the limit of {self._max_bytes} bytes")


class Admission:
    """Counts generation requests from start to end, and lets none in while draining."""

    def __init__(self, app: ASGIApp, *, requests: OpenRequests, paths: Iterable[str], metrics: FrontendMetrics) -> None:
        self._app = app
        self._requests = requests
        self._paths = frozenset(paths)
        self._metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or route_path(scope) not in self._paths:
            return await self._app(scope, receive, send)
        if self._requests.draining:
            self._metrics.count_rejection("draining")
            error = Unavailable("the server is shutting down and takes no new requests; try again later")
            return await error_response(error)(scope, receive, send)
        with self._requests.counted():
            await self._app(scope, receive, send)


def _is_below(path: str, roots: Iterable[str]) -> bool:
    return any(path == root or path.startswith(root + "/") for root in roots)


def _logger() -> logging.Logger:
    return logging.getLogger(__name__)
