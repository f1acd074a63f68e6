"""Ray shells: plain classes become Serve deployments and actors here, with every Ray option in one place.

Light to import: torch comes in only where a replica is built.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from dataclasses import replace
from functools import partial
from typing import Any

import ray
from ray import serve
from ray.serve import Application
from ray.serve.config import RequestRouterConfig

from actors.ray_shells.autoscaling import DemandMeter, worker_autoscaling, worker_load
from actors.ray_shells.host_actor import locate_host, num_nodes
from actors.ray_shells.request_router import ExpertRequestRouter
from actors.ray_shells.scheduler_client import Claim, SchedulerLink, agreed_digest
from actors.ray_shells.shelf_actor import RayShelves
from cluster.config.load import MoesaicConfig
from cluster.config.sizes import is_zero
from cluster.control.presence import WORKER_DEPLOYMENT
from cluster.control.report_loop import ReportLoop
from cluster.deployed_spec import DeployedSpec
from cluster.logs import configure_logging
from cluster.stats.open_store import open_store
from cluster.status.experts import ExpertsReport
from cluster.status.worker import WorkerStatus
from cluster.token_stream.frames import StreamAddress
from cluster.token_stream.outbox import TokenOutbox
from cluster.types import GenerationRequest, StartupPhase

INGRESS_DEPLOYMENT = "HttpIngress"

SWITCH_INTERVAL_S = 0.0005  # the engine's thread and the event loop share the interpreter lock
_POLL_S = 1.0  # a router asks for a new view at least this often
_MAX_FRONT_ENDS = 8  # each takes some hundred MB


class AttentionWorkerReplica:
    """Serve replica around one AttentionWorker."""

    def __init__(self, spec: DeployedSpec) -> None:
        from actors.attention.reporting import WorkerReporter
        from actors.attention.worker import AttentionWorker

        configure_logging()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        config, application = spec.config, spec.application
        here, replica = ray.get_runtime_context(), serve.get_replica_context()
        link = SchedulerLink(application, claim=Claim(replica.app_name, agreed_digest(spec)))
        link.claim()  # first: else it would load a model only to be refused
        info = spec.read_model()
        locate = partial(locate_host, application) if config.experts.hosts else None
        shelves = None if is_zero(config.experts.remote_tier) else RayShelves(application)
        store = open_store(spec.redis_url, application)
        self._worker = AttentionWorker(config, info, store, locate, shelves, num_nodes=num_nodes())
        self._replica_id = replica.replica_id.unique_id
        self._reporter = WorkerReporter(
            self._worker,
            config,
            link.report_worker,
            replica_id=self._replica_id,
            node_id=here.get_node_id(),
        )
        self._reports = ReportLoop(self._reporter.tell, interval_s=config.scheduler.report_interval_s)
        self._demand = DemandMeter(partial(worker_load, self._worker, config.attention.max_running))
        self._outbox: TokenOutbox | None = None  # made in the event loop that serves requests
        self._worker.start(on_ready=self._reports.soon)
        self._reports.start()

    async def submit(self, request: GenerationRequest, address: StreamAddress) -> str:
        """Start a sequence whose tokens go to the front end at `address`; this replica's id."""
        self._worker.check_admission(request)
        if self._outbox is None:
            self._outbox = TokenOutbox(self._replica_id, self._worker.generate, self._worker.progress)
        return await self._outbox.submit(request, address)

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        statuses = await self._worker.worker_statuses()
        return tuple(replace(status, degraded=(*status.degraded, *self._reports.degraded)) for status in statuses)

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        return await self._worker.experts_reports()

    async def set_expert_cache(self, setting: str) -> tuple[WorkerStatus, ...]:
        return await self._worker.set_expert_cache(setting)

    async def record_autoscaling_stats(self) -> dict[str, float]:
        """Serve asks where the number of workers may change."""
        return self._demand.stats()

    async def check_health(self) -> None:
        """Serve shows the message of a start that failed, and replaces a worker that will not move again."""
        if self._worker.phase is StartupPhase.FAILED and self._worker.error is not None:
            raise self._worker.error
        self._reporter.check_progress()

    async def __del__(self) -> None:
        await asyncio.to_thread(self._reports.stop)
        await asyncio.to_thread(self._worker.stop)


def worker_application(spec: DeployedSpec, *, max_open: int) -> Application:
    """One replica per worker; Serve must never queue what our own bounded queue is for."""
    config = spec.config
    options: dict[str, Any] = {"num_cpus": 0}
    if config.ray.worker_resources:
        options["resources"] = config.ray.worker_resources
    autoscaling = worker_autoscaling(config)
    if autoscaling is None:
        number: dict[str, Any] = {"num_replicas": config.attention.workers}
    else:
        number = {"autoscaling_config": autoscaling}
    deployment = serve.deployment(
        name=WORKER_DEPLOYMENT,
        logging_config={"enable_access_log": False},  # status pages and readiness would fill it
        **number,
        max_ongoing_requests=max_open + 64,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options=options,
        request_router_config=_router_config(config),
    )
    return deployment(AttentionWorkerReplica).bind(spec.without_keys())


def _router_config(config: MoesaicConfig) -> RequestRouterConfig:
    """Which router every handle of the workers makes, in the process that has the handle."""
    options: dict[str, Any] = {
        "request_router_class": ExpertRequestRouter,
        "request_router_kwargs": {
            "routing": config.scheduler.routing,
            "application": tuple(config.ray.application_id),
            "block_size": config.attention.block_size,
            "poll_s": min(_POLL_S, config.scheduler.report_interval_s),
        },
    }
    return RequestRouterConfig(**options)


def ingress_application(ingress: type, spec: DeployedSpec, worker: Application, *, max_open: int) -> Application:
    """The HTTP front ends; our own bounded queue refuses, Serve's must not queue before it."""
    deployment = serve.deployment(
        name=INGRESS_DEPLOYMENT,
        num_replicas=_num_front_ends(),
        max_replicas_per_node=1,  # the death of any node leaves one; a proxy prefers its own node's
        max_ongoing_requests=2 * max_open + 64,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment(serve.ingress()(ingress)).bind(spec, worker)


def _num_front_ends() -> int:
    """One for each node that there is now; not more, or Serve would wait for nodes."""
    return min(num_nodes(), _MAX_FRONT_ENDS)
