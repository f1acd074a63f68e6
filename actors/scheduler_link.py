"""Calls to the scheduler of a cluster, from any process: found by name, bounded in time, its errors ours.

Light to import: every front end and worker has one. A scheduler that Ray has restarted keeps its handle; one that was
replaced is found again by its name.
"""

from __future__ import annotations

import asyncio
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from cluster.errors import MoesaicError, Unavailable
from cluster.scheduler.diagnose import Diagnosis
from cluster.scheduler.plan import PlacementPlan
from cluster.scheduler.reports import HostReport, RoutingView, WorkerDirectives, WorkerReport
from cluster.scheduler.status import DrainLine, SchedulerStatus

SCHEDULER_ACTOR = "moesaic-scheduler"

_EXCHANGE_TIMEOUT_S = 2.0
_PAGE_TIMEOUT_S = 4.0  # below the front ends' own bound


class SchedulerLink:
    """The scheduler, called.

    Every method raises Unavailable when it does not answer in time or is not there, else what the scheduler raised.
    Coroutines are those of `SchedulerClient`, and `routing_view`; reports block and are for threads.
    """

    def __init__(self, namespace: str) -> None:
        self._namespace = namespace
        self._actor: ActorHandle | None = None

    def report_worker(self, report: WorkerReport) -> WorkerDirectives:
        """Tell what a worker is doing; what it is to do."""
        return self._ask("report_worker", report)

    def report_host(self, report: HostReport) -> None:
        """Tell what a host is doing."""
        self._ask("report_host", report)

    async def routing_view(self, known_version: int) -> RoutingView:
        """Workers now; knowledge if it is newer than `known_version`."""
        return await self._call("routing_view", known_version, timeout_s=_EXCHANGE_TIMEOUT_S)

    async def status(self) -> SchedulerStatus:
        """What the scheduler says of itself."""
        return await self._call("status")

    async def plan(self) -> PlacementPlan:
        """What it would do now; nothing is done."""
        return await self._call("plan")

    async def diagnose(self) -> Diagnosis:
        """What routing and placement could gain."""
        return await self._call("diagnose")

    async def drain(self, node: str) -> DrainLine:
        """Empty a node."""
        return await self._call("drain", node)

    async def undrain(self, node: str) -> DrainLine:
        """Use a node again."""
        return await self._call("undrain", node)

    def _ask(self, method: str, *args: object) -> Any:
        try:
            return ray.get(getattr(self._found(), method).remote(*args), timeout=_EXCHANGE_TIMEOUT_S)
        except (ValueError, RayError) as error:
            raise self._translated(error) from error

    async def _call(self, method: str, *args: object, timeout_s: float = _PAGE_TIMEOUT_S) -> Any:
        try:
            async with asyncio.timeout(timeout_s):
                actor = self._actor or await asyncio.to_thread(self._found)
                return await getattr(actor, method).remote(*args)
        except (TimeoutError, ValueError, RayError) as error:
            raise self._translated(error) from error

    def _found(self) -> ActorHandle:
        if self._actor is None:
            self._actor = ray.get_actor(SCHEDULER_ACTOR, namespace=self._namespace)
        return self._actor

    def _translated(self, error: Exception) -> MoesaicError:
        if isinstance(error, RayTaskError):
            cause = error.cause
            return cause if isinstance(cause, MoesaicError) else MoesaicError(f"the scheduler failed: {cause!r}")
        if isinstance(error, RayActorError):
            self._actor = None  # gone, or in another place
        if isinstance(error, TimeoutError | GetTimeoutError):
            return Unavailable("the scheduler does not answer in time")
        if isinstance(error, ValueError):
            return Unavailable("there is no scheduler")
        return Unavailable(f"the scheduler was lost: {type(error).__name__}")
