"""Brings the scheduler's routing view to a router now and then, beside the requests. Without a scheduler it ages.

Knows the link and who takes views; knows nothing of replicas.
"""

from __future__ import annotations

import time
from typing import Protocol

from cluster.errors import MoesaicError
from cluster.periodic import Pace, PeriodicTask
from cluster.status.reports import RoutingView


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
        pace = Pace(
            "routing-view",
            interval_s=interval_s,
            expected=(MoesaicError,),
            event="routing goes on with an old view",
        )
        self._task = PeriodicTask(self._ask, pace)

    def start(self) -> None:
        """Ask from now on; a second call does nothing."""
        self._task.start()

    def stop(self) -> None:
        """Ask no more."""
        self._task.stop()

    async def _ask(self) -> None:
        self._taker.update(await self._source.routing_view(self._taker.known_version), time.monotonic())
