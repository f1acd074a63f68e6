"""Brings the scheduler's routing view to a router now and then, beside the requests. Without a scheduler it ages.

Knows the link and who takes views; knows nothing of replicas.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import Protocol

from cluster.errors import MoesaicError
from cluster.logs import log_event
from cluster.status.reports import RoutingView

_LOG = logging.getLogger(__name__)


class ViewSource(Protocol):
    """Where views come from. Bounded; raises MoesaicError where there is none."""

    async def routing_view(self, known_version: int) -> RoutingView: ...


class ViewTaker(Protocol):
    """Who decides by views. known_version: of the knowledge it has."""

    @property
    def known_version(self) -> int: ...

    def update(self, view: RoutingView, now_s: float) -> None: ...


class RoutingPoll:
    """One task in the event loop of the router; `start` and `stop` belong to that loop."""

    def __init__(self, source: ViewSource, taker: ViewTaker, *, interval_s: float) -> None:
        self._source = source
        self._taker = taker
        self._interval_s = interval_s
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Ask from now on; a second call does nothing."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Ask no more."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def _run(self) -> None:
        is_away = False
        while True:
            try:
                view = await self._source.routing_view(self._taker.known_version)
                self._taker.update(view, time.monotonic())
                is_away = False
            except MoesaicError as error:
                if not is_away:
                    log_event(_LOG, logging.WARNING, "routing goes on with an old view", reason=error.message)
                is_away = True
            except Exception as error:  # noqa: BLE001 - top loop: routing must go on
                log_event(_LOG, logging.ERROR, "a routing view was not taken", error=error)
            await asyncio.sleep(self._interval_s)
