"""Answering while the client is there: server-sent events, keep-alive, and stopping when the client leaves.

Knows ASGI; knows no tokens. The events come from an async generator, which is always closed.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from typing import Any, TypeVar

from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from cluster.errors import MoesaicError
from cluster.frontend.openai_api.answers import KEEP_ALIVE_EVENT, error_event
from cluster.logs import log_event

Result = TypeVar("Result")


async def run_while_connected(
    work: Coroutine[Any, Any, Result],
    receive: Receive,
    *,
    tick_s: float | None = None,
    on_tick: Callable[[], Awaitable[None]] | None = None,
) -> Result | None:
    """The result of `work`, or None if the client left; then, and when we are cancelled, `work` is cancelled.

    Every `tick_s` meanwhile, `on_tick` is awaited.
    """
    task = asyncio.create_task(work)
    gone = asyncio.create_task(_disconnected(receive))
    try:
        while not task.done() and not gone.done():
            await asyncio.wait((task, gone), timeout=tick_s, return_when=asyncio.FIRST_COMPLETED)
            if on_tick is not None and not task.done() and not gone.done():
                await on_tick()
        return await task if task.done() else None
    finally:
        task.cancel()
        gone.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(StreamingResponse):
    """Server-sent events. The status line waits for the first event, so that an early error has its own status.

    It waits no longer than `keep_alive_s`: then headers and a comment go out, so that no proxy gives up.
    """

    def __init__(self, events: AsyncGenerator[bytes], *, keep_alive_s: float, request_id: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._events = events
        self._keep_alive_s = keep_alive_s
        self._request_id = request_id
        self._is_started = False
        self._last_sent_s = 0.0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        loop = asyncio.get_running_loop()
        sending = asyncio.Lock()  # events and keep-alive comments come from two tasks
        self._last_sent_s = loop.time()

        async def send_event(event: bytes) -> None:
            async with sending:
                if not self._is_started:
                    self._is_started = True
                    start = {"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers}
                    await send(start)
                await send({"type": "http.response.body", "body": event, "more_body": True})
            self._last_sent_s = loop.time()

        async def keep_alive() -> None:
            if loop.time() - self._last_sent_s >= self._keep_alive_s:
                await send_event(KEEP_ALIVE_EVENT)

        try:
            pump = self._pump(send_event)
            await run_while_connected(pump, receive, tick_s=self._keep_alive_s / 2, on_tick=keep_alive)
            if self._is_started:
                await send({"type": "http.response.body", "body": b"", "more_body": False})
        except OSError as error:  # what servers raise when they write to a closed connection
            if not self._is_started:
                raise
            log_event(_logger(), logging.DEBUG, "client left", request_id=self._request_id, reason=repr(error))

    async def _pump(self, send_event: Callable[[bytes], Awaitable[None]]) -> None:
        """Send all events; an error after the first becomes the last event."""
        try:
            async for event in self._events:
                await send_event(event)
        except OSError:
            raise
        except Exception as error:
            if not self._is_started:
                raise
            cause = None if isinstance(error, MoesaicError) else error
            reason = repr(error)
            log_event(
                _logger(), logging.WARNING, "stream failed", error=cause, request_id=self._request_id, reason=reason
            )
            await send_event(error_event(error))
        finally:
            await self._events.aclose()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


def _logger() -> logging.Logger:
    return logging.getLogger(__name__)
