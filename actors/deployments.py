"""Ray shells: plain classes become Serve deployments and actors here, with every Ray option in one place.

Light to import: torch comes in only where a replica is built.
"""

from __future__ import annotations

import asyncio
import logging
import sys
from functools import partial
from typing import Any

from ray import serve
from ray.serve import Application

from actors.expert_host_actor import locate_host
from actors.expert_shelf import RayShelves
from actors.token_stream import StreamAddress, TokenOutbox
from cluster.config import MoesaicConfig, from_tree, is_zero, to_tree
from cluster.model_info import load_model_info
from cluster.observability.logs import configure_logging
from cluster.stats.open_store import open_store
from cluster.types import ExpertsReport, GenerationRequest, StartupPhase, WorkerStatus

WORKER_DEPLOYMENT = "AttentionWorker"
INGRESS_DEPLOYMENT = "HttpIngress"

SWITCH_INTERVAL_S = 0.0005  # the engine's thread and the event loop share the interpreter lock


class AttentionWorkerReplica:
    """Serve replica around one AttentionWorker."""

    def __init__(self, config_tree: dict[str, Any], redis_url: str | None) -> None:
        from actors.attention_worker import AttentionWorker

        configure_logging()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        config = from_tree(config_tree)
        model = config.model
        info = load_model_info(model.path, served_name=model.served_name, max_model_len=model.max_model_len)
        locate = partial(locate_host, config.ray.namespace) if config.experts.hosts else None
        shelves = None if is_zero(config.experts.remote_tier) else RayShelves(config.ray.namespace)
        self._worker = AttentionWorker(config, info, open_store(redis_url), locate, shelves)
        self._outbox: TokenOutbox | None = None  # made in the event loop that serves requests
        self._worker.start()

    async def submit(self, request: GenerationRequest, address: StreamAddress) -> str:
        """Start a sequence whose tokens go to the front end at `address`; this worker's id."""
        self._worker.check_admission()
        if self._outbox is None:
            self._outbox = TokenOutbox(self._worker.worker_id, self._worker.generate)
        return await self._outbox.submit(request, address)

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        return await self._worker.worker_statuses()

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        return await self._worker.experts_reports()

    async def set_expert_cache(self, setting: str) -> tuple[WorkerStatus, ...]:
        return await self._worker.set_expert_cache(setting)

    async def check_health(self) -> None:
        """Serve shows the message of a start that failed; nothing else is unhealthy."""
        if self._worker.phase is StartupPhase.FAILED and self._worker.error is not None:
            raise self._worker.error

    async def __del__(self) -> None:
        await asyncio.to_thread(self._worker.stop)


def worker_application(config: MoesaicConfig, redis_url: str | None, *, max_open: int) -> Application:
    """One replica per worker; Serve must never queue what our own bounded queue is for."""
    options: dict[str, Any] = {"num_cpus": 0}
    if config.ray.worker_resources:
        options["resources"] = config.ray.worker_resources
    deployment = serve.deployment(
        name=WORKER_DEPLOYMENT,
        logging_config={"enable_access_log": False},  # status pages and readiness would fill it
        num_replicas=config.attention.workers,
        max_ongoing_requests=max_open + 64,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options=options,
    )
    return deployment(AttentionWorkerReplica).bind(to_tree(config), redis_url)


def ingress_application(
    ingress: type, config_tree: dict[str, Any], worker: Application, *, max_open: int
) -> Application:
    """The HTTP ingress; our own bounded queue refuses, Serve's must not queue before it."""
    deployment = serve.deployment(
        name=INGRESS_DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=2 * max_open + 64,
        health_check_period_s=5,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment(serve.ingress()(ingress)).bind(config_tree, worker)
