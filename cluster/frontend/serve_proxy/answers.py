"""What a Serve proxy answers by itself, as our errors: no route yet or any more, no front end, time out, full.

Serve calls `middlewares` in each proxy whose environment names it (`PROXY_ENVIRONMENT`). The proxy's own plain texts
are known by their words, which a contract test holds against Serve's. Answers of applications pass untouched, and so
do Serve's pages below `/-/`. Knows ASGI and the error table; imports no Ray.
"""

from __future__ import annotations

import asyncio
import contextlib
import re
import time
from collections.abc import Callable, Iterable

import orjson
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.errors import DeadlineExceeded, Overloaded, Unavailable
from cluster.frontend.http.errors import error_response, unknown_route_response
from cluster.frontend.serve_proxy.protocol import install_protocol
from cluster.frontend.serve_proxy.request_id import OneRequestId
from cluster.types import StartupPhase

PROXY_ENVIRONMENT = {"RAY_SERVE_HTTP_PROXY_CALLBACK_IMPORT_PATH": "cluster.frontend.serve_proxy.answers:middlewares"}
"""What a node's environment needs before Ray starts there: Serve reads it when a proxy starts."""

_SILENT_S = 2.0  # a request that nobody has answered for so long: is there a front end at all?
_FIRST_PROBE_S = 3.0  # that a front end has to answer a probe, while none has answered anything yet
_PROBE_S = 15.0  # the same where one has: it may be very busy
_MAX_OWN_BYTES = 4096  # what is looked at of a text
_SERVE_PAGES = "/-/"
_ROUTES_PAGE = "/-/routes"
_BACK_PRESSURE = b"Request dropped due to backpressure"
_OWN_TEXTS = {
    404: re.compile(rb"Path '.*' not found\. Ping http", re.DOTALL),
    408: re.compile(rb"Request \S+ timed out"),
    429: re.compile(_BACK_PRESSURE),
    503: re.compile(_BACK_PRESSURE + rb"|.* is unavailable because it failed to deploy", re.DOTALL),
}
_REASONS = {
    StartupPhase.STARTING: "the server is starting and takes no requests yet; try again later",
    StartupPhase.DRAINING: "no front end answers: the server is shutting down, or starts one anew; try again later",
}


def middlewares() -> list[Middleware]:
    """Serve's proxy callback; the last one sees a request first."""
    install_protocol()
    return [Middleware(ProxyAnswers), Middleware(OneRequestId)]


class ProxyAnswers:
    """Stands around a Serve proxy and gives its own answers our form.

    A request that no front end answers at all is not left waiting for one: the proxy would hold it until its own time
    is out.
    """

    def __init__(
        self,
        app: ASGIApp,
        *,
        silent_s: float = _SILENT_S,
        first_probe_s: float = _FIRST_PROBE_S,
        probe_s: float = _PROBE_S,
    ) -> None:
        self._app = app
        self._silent_s, self._first_probe_s, self._probe_s = silent_s, first_probe_s, probe_s
        self._answered_s: float | None = None  # when a front end last answered anything
        self._probes: dict[str, asyncio.Task[bool]] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["path"].startswith(_SERVE_PAGES):
            return await self._app(scope, receive, send)
        answer = _Answer(send, self._note_answered)
        inner = asyncio.ensure_future(self._app(scope, receive, answer.send))
        inner.add_done_callback(lambda _: answer.settled.set())
        try:
            if await self._is_answered(scope, answer):
                await inner
        finally:
            inner.cancel()
        if not answer.begun:
            answer.is_closed = True
            response = await self._own_response(scope, answer)
            await response(scope, receive, send)

    async def _is_answered(self, scope: Scope, answer: _Answer) -> bool:
        """Wait for the first words of an answer; False if there is no front end that could give one."""
        while not answer.settled.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(answer.settled.wait(), self._silent_s)
            if not answer.settled.is_set() and self._is_silent and not await self._lives(scope):
                return answer.settled.is_set()
        return True

    @property
    def _is_silent(self) -> bool:
        return self._answered_s is None or time.monotonic() - self._answered_s > self._silent_s

    def _note_answered(self) -> None:
        self._answered_s = time.monotonic()

    async def _lives(self, scope: Scope) -> bool:
        """Whether a front end answers a probe; requests that wait for the same one ask once."""
        path = f"{_prefix_of(await self._routes(scope), scope['path']).rstrip('/')}/health"
        probe = self._probes.get(path)
        if probe is None:
            probe = self._probes[path] = asyncio.create_task(self._probe({**scope, "path": path}))
            probe.add_done_callback(lambda _: self._probes.pop(path))
        return await asyncio.shield(probe)

    async def _probe(self, scope: Scope) -> bool:
        answer = _Answer(_drop, self._note_answered)
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self._first_probe_s if self._answered_s is None else self._probe_s):
                await self._get(scope, answer.send)
        return answer.begun

    async def _routes(self, scope: Scope) -> dict[str, str]:
        """Names of applications by their route prefixes, as this proxy knows them."""
        messages: list[Message] = []

        async def take(message: Message) -> None:
            messages.append(message)

        await self._get({**scope, "path": _ROUTES_PAGE}, take)
        if not messages or messages[0].get("status") != 200:
            return {}
        return orjson.loads(b"".join(message.get("body", b"") for message in messages))

    async def _get(self, scope: Scope, send: Send) -> None:
        """Ask the proxy for a page: a request of nobody, who stays to hear the answer."""
        never = asyncio.Event()
        is_sent = False

        async def receive() -> Message:
            nonlocal is_sent
            if is_sent:
                await never.wait()
            is_sent = True
            return {"type": "http.request", "body": b"", "more_body": False}

        host = [(name, value) for name, value in scope["headers"] if name == b"host"]
        page: Scope = {
            **scope,
            "method": "GET",
            "raw_path": scope["path"].encode(),
            "query_string": b"",
            "headers": host,
        }
        await self._app(page, receive, send)

    async def _own_response(self, scope: Scope, answer: _Answer) -> Response:
        """In the place of what the proxy says, or does not say."""
        if answer.own_status == 404:
            routes = await self._routes(scope)
            # Others are served here and this is nobody's. One that has its route by now is starting.
            if routes and not _prefix_of(routes, scope["path"]):
                return unknown_route_response(scope["method"], scope["path"])
        if answer.own_status == 408:
            return error_response(DeadlineExceeded("the request's time ran out before a front end answered it"))
        if answer.own_text.startswith(_BACK_PRESSURE):
            return error_response(Overloaded("too many requests wait for a front end; try again later"))
        phase = StartupPhase.STARTING if self._answered_s is None else StartupPhase.DRAINING
        if scope["path"] == "/ready":
            body = orjson.dumps({"phase": phase, "error": None})
            return Response(body, 503, {"Retry-After": "2"}, "application/json")
        return error_response(Unavailable(_REASONS[phase]))


class _Answer:
    """Passes an answer on as it comes, unless it is the proxy's own: that one is kept back and told apart."""

    def __init__(self, send: Send, on_answer: Callable[[], None]) -> None:
        self._send = send
        self._on_answer = on_answer
        self._held: Message | None = None
        self.settled = asyncio.Event()  # it has begun, or will not
        self.begun = False
        self.is_closed = False  # somebody else has answered
        self.own_status = 0
        self.own_text = b""

    async def send(self, message: Message) -> None:
        """What the proxy sends."""
        if self.is_closed or self.own_status:
            return
        if not self.begun and message["type"] == "http.response.start" and _may_be_own(message):
            self._held = message
            return
        held, self._held = self._held, None
        if held is not None:
            text: bytes = message.get("body", b"")
            if _OWN_TEXTS[held["status"]].match(text[:_MAX_OWN_BYTES]):
                self.own_status, self.own_text = held["status"], text
                return
        if not self.begun:
            self.begun = True
            self._on_answer()
            self.settled.set()
        if held is not None:
            await self._send(held)
        await self._send(message)


def _may_be_own(start: Message) -> bool:
    return start["status"] in _OWN_TEXTS and Headers(raw=start["headers"]).get("content-type", "").startswith(
        "text/plain"
    )


def _prefix_of(routes: Iterable[str], path: str) -> str:
    """The longest route prefix that a path is below; empty without one."""
    below = (p for p in routes if path == p or path.startswith(p.rstrip("/") + "/"))
    return max(below, key=len, default="")


async def _drop(_message: Message) -> None:
    """Nobody reads a probe's answer."""
