"""Routes for probes, dashboards and the command line. Knows statuses and their JSON; no Ray, no store."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import orjson
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import ConfigError, InvalidRequest, MoesaicError, Unavailable
from cluster.frontend.http.body import read_body
from cluster.frontend.http.open_requests import OpenRequests
from cluster.frontend.http.root_page import program_version
from cluster.frontend.http.snapshots import Snapshots
from cluster.frontend.openai_api.schema import ExpertCacheBody
from cluster.observability.metrics import FrontendMetrics
from cluster.observability.scheduler_metrics import scheduler_metrics_text
from cluster.observability.worker_metrics import worker_metrics_text
from cluster.protocols import AttentionWorkerClient, SchedulerClient
from cluster.status.experts import ClusterActivations, ExpertsReport
from cluster.status.worker import WorkerStatus
from cluster.types import StartupPhase

_WORKER_TIMEOUT_S = 5.0
_PROBE_TIMEOUT_S = 0.5  # who asks whether the process lives gives it a second

Answer = TypeVar("Answer")


class OperatorRoutes:
    """What the cluster says of itself."""

    def __init__(
        self,
        worker: AttentionWorkerClient,
        requests: OpenRequests,
        metrics: FrontendMetrics,
        *,
        scheduler: SchedulerClient | None = None,
        per_expert_metrics: bool = False,
        max_age_s: float = 0.0,
        notices: Sequence[str] = (),
    ) -> None:
        """Args: max_age_s: of what workers and scheduler said; who asks within it is told the same."""
        self._snapshots = Snapshots(max_age_s, timeout_s=_WORKER_TIMEOUT_S)
        self._fresh = Snapshots(0.0, timeout_s=_WORKER_TIMEOUT_S)  # for people who look at experts
        self._notices = tuple(notices)
        self._worker = worker
        self._requests = requests
        self._metrics = metrics
        self._scheduler = scheduler
        self._per_expert = per_expert_metrics

    async def health(self) -> Response:
        """GET /health: the process lives; 503 where every worker that could answer only fails."""
        try:
            workers = await self._worker_answer(
                self._snapshots.get("workers", self._worker.worker_statuses), timeout_s=_PROBE_TIMEOUT_S
            )
        except MoesaicError:  # starting, busy or away: that is for /ready
            workers = ()
        ready = [worker for worker in workers if worker.phase is StartupPhase.READY]
        failed_steps = max((worker.failed_steps for worker in workers), default=0)
        if ready and all(worker.is_failing for worker in ready):
            reasons = [worker.degraded[0] for worker in ready if worker.degraded]
            body = {"status": "failing", "failed_steps": failed_steps, "reasons": reasons}
            return _json(body, 503, {"Retry-After": "2"})
        return _json({"status": "ok", "failed_steps": failed_steps})

    async def ready(self) -> Response:
        """GET /ready: requests would be answered; otherwise 503 with the start-up phase."""
        try:
            phase, error = readiness(await self._snapshot("workers", self._worker.worker_statuses))
        except MoesaicError as failure:
            phase, error = StartupPhase.FAILED, failure.message
        if self._requests.draining:
            phase = StartupPhase.DRAINING
        is_ready = phase is StartupPhase.READY
        headers = {} if is_ready else {"Retry-After": "2"}
        return _json({"phase": phase, "error": error}, 200 if is_ready else 503, headers)

    async def metrics_text(self) -> Response:
        """GET /metrics: ours, the workers' and hosts', the cluster's expert load, and the scheduler's."""
        try:
            workers = worker_metrics_text(
                await self._snapshot("workers", self._worker.worker_statuses),
                await self._snapshot("hosts", self._worker.host_statuses),
                cluster_activations(await self._snapshot("experts", self._worker.experts_reports)),
                per_expert=self._per_expert,
            )
        except MoesaicError as failure:
            workers = f"# {failure.message}\n"
        central = await self._scheduler_metrics()
        return Response(self._metrics.text() + workers + central, headers={"Content-Type": self._metrics.content_type})

    async def experts(self) -> Response:
        """GET /experts: residency and activation by layer, of each process and of the cluster."""
        workers = await self._worker_answer(self._fresh.get("workers", self._worker.worker_statuses))
        hosts = await self._worker_answer(self._fresh.get("hosts", self._worker.host_statuses))
        reports = {
            r.owner_id: r for r in await self._worker_answer(self._fresh.get("experts", self._worker.experts_reports))
        }
        page: dict[str, list[object]] = {"workers": [], "hosts": []}
        for kind, owner_id, memory in (
            *(("workers", worker.worker_id, worker.expert_memory) for worker in workers),
            *(("hosts", host.host_id, host.expert_memory) for host in hosts),
        ):
            if owner_id in reports:
                page[kind].append({"id": owner_id, "memory": memory, "layers": reports[owner_id].layers})
        return _json({**page, "cluster": cluster_activations(tuple(reports.values()))})

    async def set_expert_cache(self, request: Request) -> Response:
        """POST /experts/cache {"cache": "25%"}: every worker's fast expert memory, from now on until it restarts."""
        body = await read_body(request, ExpertCacheBody)
        try:
            workers = await self._worker_answer(self._worker.set_expert_cache(body.cache))
            self._snapshots.forget()
        except ConfigError as error:  # here it is the client's mistake
            raise InvalidRequest(error.message, param="cache") from error
        return _json({"workers": [{"id": w.worker_id, "memory": w.expert_memory} for w in workers]})

    async def status(self) -> Response:
        """GET /status: what the workers say of themselves."""
        workers = await self._snapshot("workers", self._worker.worker_statuses)
        hosts = await self._snapshot("hosts", self._worker.host_statuses)
        facts = {
            "draining": self._requests.draining,
            "num_in_flight": self._requests.num_in_flight,
            "notices": self._notices,
        }
        return _json({"workers": workers, "hosts": hosts, **facts})

    async def load(self) -> Response:
        """GET /load: requests that this front end is answering, as balancers ask of vLLM's servers."""
        return _json({"server_load": self._requests.num_in_flight})

    async def version(self) -> Response:
        """GET /version"""
        return _json({"version": program_version()})

    async def _scheduler_metrics(self) -> str:
        if self._scheduler is None:
            return ""
        try:
            return scheduler_metrics_text(await self._snapshot("scheduler", self._scheduler.status))
        except MoesaicError:
            return scheduler_metrics_text(None)

    async def _snapshot(self, name: str, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """What many may ask for at the same time."""
        return await self._worker_answer(self._snapshots.get(name, ask))

    async def _worker_answer(self, call: Awaitable[Answer], *, timeout_s: float = _WORKER_TIMEOUT_S) -> Answer:
        try:
            async with asyncio.timeout(timeout_s):
                return await call
        except (ConnectionError, TimeoutError) as error:
            raise Unavailable(f"the attention worker does not answer ({type(error).__name__})") from error


def readiness(workers: Sequence[WorkerStatus]) -> tuple[StartupPhase, str | None]:
    """Phase of the cluster, and its error: ready as soon as one worker is, unless all that are ready only fail."""
    ready = [worker for worker in workers if worker.phase is StartupPhase.READY]
    if any(not worker.is_failing for worker in ready):
        return StartupPhase.READY, None
    if ready:
        return StartupPhase.FAILED, "; ".join(ready[0].degraded[:1])
    first = workers[0]
    return first.phase, first.error


def cluster_activations(reports: Sequence[ExpertsReport]) -> ClusterActivations | None:
    """The cluster-wide counts: those of the first worker that reads the shared store well, else the first's."""
    views = [report.cluster for report in reports if report.cluster is not None]
    return next((view for view in views if view.degraded is None), views[0] if views else None)


def _json(value: object, status: int = 200, headers: dict[str, str] | None = None) -> Response:
    return Response(orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS), status, headers, "application/json")
