"""Calls to the scheduler of an application, from any process: found by name, bounded in time, its errors ours.

Light to import: every front end and worker has one. A scheduler that Ray has restarted keeps its handle; one that was
replaced is found again by its name.
"""

from __future__ import annotations

import asyncio
import time
from typing import Any, NamedTuple

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayActorError, RayError, RayTaskError

from actors.ray_shells.named_actors import ActorKind, DetachedActors
from cluster.application import ApplicationId
from cluster.deployed_spec import DeployedSpec
from cluster.errors import MoesaicError, Unavailable
from cluster.placement.plan import PlacementPlan
from cluster.status.diagnosis import Diagnosis
from cluster.status.reports import HostReport, RoutingView, WorkerDirectives, WorkerReport
from cluster.status.scheduler import DrainLine, SchedulerStatus

_CLAIM_TIMEOUT_S = 60.0  # it may be starting, on a slow machine
_CLAIM_EVERY_S = 0.5
_EXCHANGE_TIMEOUT_S = 2.0
_PAGE_TIMEOUT_S = 4.0  # below the front ends' own bound


class Claim(NamedTuple):
    """What a worker says of itself: Serve's name of its application, and the hash of what was deployed."""

    served_as: str
    digest: str


def agreed_digest(spec: DeployedSpec) -> str:
    """Hash of all that an application's scheduler and workers must agree in; known before the store is."""
    return spec.digest("attention", "experts", "scheduler", "redis")


class SchedulerLink:
    """The scheduler, called.

    Every method raises Unavailable when it does not answer in time or is not there, else what the scheduler raised.
    Coroutines are those of `SchedulerClient`, and `routing_view`; reports block and are for threads.
    """

    def __init__(self, application: ApplicationId, *, claim: Claim | None = None) -> None:
        """Args: claim: None: this process is no worker's."""
        self._schedulers = DetachedActors(application, ActorKind.SCHEDULER)
        self._claim = claim
        self._actor: ActorHandle | None = None

    def claim(self) -> None:
        """Say whose worker this is, once the scheduler answers; it is said again with every report.

        Raises:
            ConfigError: another application has this one's name; says what to set.
        """
        deadline_s = time.monotonic() + _CLAIM_TIMEOUT_S
        while True:
            try:
                return self._ask("claim", self._claim)
            except Unavailable:
                if time.monotonic() > deadline_s:
                    return  # the reports go on saying it, and that nobody hears them
            time.sleep(_CLAIM_EVERY_S)

    def report_worker(self, report: WorkerReport) -> WorkerDirectives:
        """Tell what a worker is doing; what it is to do.

        Raises:
            ConfigError: as `claim`.
        """
        return self._ask("report_worker", report, self._claim)

    def report_host(self, report: HostReport) -> None:
        """Tell what a host is doing."""
        self._ask("report_host", report)

    async def routing_view(self, known_version: int) -> RoutingView:
        """Workers now; knowledge if it is newer than `known_version`."""
        return await self._call("routing_view", known_version, timeout_s=_EXCHANGE_TIMEOUT_S)

    async def owner(self) -> str | None:
        """Serve's name of the application; None until one of its workers has said it."""
        return await self._call("owner", timeout_s=_EXCHANGE_TIMEOUT_S)

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
            self._actor = self._schedulers.find()
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
