"""One name for a request in a Serve proxy, which else adds one of its own to every answer. Pure ASGI."""

from __future__ import annotations

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from cluster.frontend.http.request_id import choose_request_id

_HEADER = "x-request-id"


class OneRequestId:
    """Names the request before Serve does, and leaves one name in the answer."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            return await self._app(scope, receive, send)
        given = MutableHeaders(scope=scope)
        request_id = choose_request_id(given.get(_HEADER))
        given[_HEADER] = request_id  # a list of the scope's own: Serve reads it

        async def send_once(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)[_HEADER] = request_id
            await send(message)

        await self._app(scope, receive, send_once)
