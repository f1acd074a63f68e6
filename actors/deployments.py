"""Ray shells: plain classes become Serve deployments and actors here, with every Ray option in one place.

Light to import: torch comes in only where a replica is built.
"""

from __future__ import annotations

import asyncio
import logging
import sys
import tempfile
from pathlib import Path
from typing import Any

import ray
from ray import serve
from ray.exceptions import GetTimeoutError, RayActorError, RayTaskError
from ray.serve import Application

from actors.token_stream import StreamAddress, TokenOutbox
from cluster.config import from_tree
from cluster.model_info import load_model_info
from cluster.observability.logs import configure_logging
from cluster.stats.embedded_valkey import EmbeddedValkey, start_embedded_valkey
from cluster.stats.open_store import open_store
from cluster.types import ExpertsReport, GenerationRequest, StartupPhase, WorkerStatus

VALKEY_ACTOR = "moesaic-valkey"
WORKER_DEPLOYMENT = "AttentionWorker"
INGRESS_DEPLOYMENT = "HttpIngress"

_SWITCH_INTERVAL_S = 0.0005  # the engine's thread and the event loop share the interpreter lock


class AttentionWorkerReplica:
    """Serve replica around one AttentionWorker."""

    def __init__(self, config_tree: dict[str, Any], redis_url: str | None) -> None:
        from actors.attention_worker import AttentionWorker

        configure_logging()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        sys.setswitchinterval(_SWITCH_INTERVAL_S)
        config = from_tree(config_tree)
        model = config.model
        info = load_model_info(model.path, served_name=model.served_name, max_model_len=model.max_model_len)
        self._worker = AttentionWorker(config, info, open_store(redis_url))
        self._outbox: TokenOutbox | None = None  # made in the event loop that serves requests
        self._worker.start()

    async def submit(self, request: GenerationRequest, address: StreamAddress) -> str:
        """Start a sequence whose tokens go to the front end at `address`; this worker's id."""
        self._worker.check_admission()
        if self._outbox is None:
            self._outbox = TokenOutbox(self._worker.worker_id, self._worker.generate)
        return await self._outbox.submit(request, address)

    async def status(self) -> WorkerStatus:
        return await self._worker.status()

    async def experts(self) -> ExpertsReport:
        return await self._worker.experts()

    async def metrics_text(self) -> str:
        return await self._worker.metrics_text()

    async def check_health(self) -> None:
        """Serve shows the message of a start that failed; nothing else is unhealthy."""
        if self._worker.phase is StartupPhase.FAILED and self._worker.error is not None:
            raise self._worker.error

    async def __del__(self) -> None:
        await asyncio.to_thread(self._worker.stop)


class ValkeyHolder:
    """Keeps the embedded Valkey: its child process ends with this actor."""

    def __init__(self) -> None:
        self._data = tempfile.TemporaryDirectory(prefix="moesaic-valkey-")
        self._server: EmbeddedValkey = start_embedded_valkey(Path(self._data.name))

    def url(self) -> str:
        """Where it listens."""
        return self._server.url

    def stop(self) -> None:
        """End the server."""
        self._server.stop()
        self._data.cleanup()


def worker_application(config_tree: dict[str, Any], redis_url: str | None, *, max_open: int) -> Application:
    """One replica per worker; Serve must never queue what our own bounded queue is for."""
    deployment = serve.deployment(
        name=WORKER_DEPLOYMENT,
        num_replicas=1,
        max_ongoing_requests=max_open + 64,
        health_check_period_s=2,
        graceful_shutdown_timeout_s=5,
        graceful_shutdown_wait_loop_s=0.2,
        ray_actor_options={"num_cpus": 0},
    )
    return deployment(AttentionWorkerReplica).bind(config_tree, redis_url)


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


def start_valkey_actor(namespace: str) -> ray.ObjectRef:
    """URL-to-be of the cluster's embedded Valkey, started if there is none yet; returns at once."""
    actor_class: Any = ray.remote(ValkeyHolder)
    actor = actor_class.options(
        name=VALKEY_ACTOR, namespace=namespace, lifetime="detached", get_if_exists=True, num_cpus=0
    )
    return actor.remote().url.remote()


def valkey_url(namespace: str) -> str:
    """URL of the cluster's embedded Valkey, started if there is none yet.

    Raises:
        ConnectionError: there is no server program, or it does not start.
    """
    try:
        return ray.get(start_valkey_actor(namespace), timeout=60)
    except (RayActorError, RayTaskError, GetTimeoutError) as error:
        raise ConnectionError(f"the embedded Valkey did not start: {error}") from error


def stop_valkey_actor(namespace: str) -> None:
    """End the embedded Valkey of this cluster, if there is one."""
    try:
        holder = ray.get_actor(VALKEY_ACTOR, namespace=namespace)
    except ValueError:
        return
    ray.get(holder.stop.remote(), timeout=10)
    ray.kill(holder)
