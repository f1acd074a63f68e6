"""Ray's side of expert hosts: the actor around an ExpertHost, starting and ending them, finding and asking them.

Hosts are named, detached and restarted by Ray; whoever needs one looks it up by its number. Every `.remote` to a host
but the actor-call carrier's is here.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.data_plane.channel import HostEndpoint
from cluster.config import MoesaicConfig, from_tree
from cluster.errors import MoesaicError, Unavailable
from cluster.model_info import load_model_info
from cluster.observability.logs import configure_logging
from cluster.types import ExpertHostStatus, ExpertsReport, StartupPhase

_CALL_TIMEOUT_S = 5.0
_THREADS = 16  # calls at a time; an actor-call dispatch blocks one


def actor_name(index: int) -> str:
    """The Ray name of host `index`, in the configured namespace."""
    return f"moesaic-expert-host-{index}"


class ExpertHostActor:
    """Ray actor around one ExpertHost."""

    def __init__(self, config_tree: dict[str, Any], index: int) -> None:
        from actors.expert_host import ExpertHost

        configure_logging()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = from_tree(config_tree)
        model = config.model
        info = load_model_info(model.path, served_name=model.served_name, max_model_len=model.max_model_len)
        self._fingerprint = info.fingerprint
        self._host = ExpertHost(config, info, index)
        self._host.start(ray.util.get_node_ip_address())

    def serves(self, fingerprint: str, num_hosts: int) -> bool:
        """Whether this host was started for this model and number of hosts."""
        return self._fingerprint == fingerprint and self._host.num_hosts == num_hosts

    def endpoint(self) -> HostEndpoint:
        """Where workers connect; raises while it starts."""
        context = ray.get_runtime_context()
        name = context.get_actor_name() or ""
        return replace(self._host.endpoint(), actor_name=name, actor_namespace=context.namespace)

    def welcome_json(self, worker_id: str, fingerprint: str) -> dict[str, object]:
        """Handshake of the actor-call carrier."""
        return self._host.welcome_json(worker_id, fingerprint)

    def dispatch(self, data: bytes) -> bytes:
        """One frame of the actor-call carrier."""
        return self._host.dispatch(data)

    def status(self) -> ExpertHostStatus:
        """What the host says of itself."""
        return self._host.status()

    def experts_report(self) -> ExpertsReport:
        """Residency per layer."""
        return self._host.experts_report()

    def process_id(self) -> int:
        """Of the actor's process."""
        return os.getpid()

    def stop(self) -> None:
        """End connections and compute."""
        self._host.stop()


def start_expert_hosts(config: MoesaicConfig, config_tree: dict[str, Any], fingerprint: str) -> None:
    """Start the configured hosts, each if there is none of its number for this model; returns at once."""
    actor_class: Any = ray.remote(ExpertHostActor)
    for index in range(config.experts.hosts):
        options = actor_class.options(
            name=actor_name(index),
            namespace=config.ray.namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            resources=config.ray.host_resources or None,
            scheduling_strategy="SPREAD",
            max_restarts=-1,
            max_concurrency=_THREADS,
        )
        with contextlib.suppress(ValueError):
            existing = ray.get_actor(actor_name(index), namespace=config.ray.namespace)
            if not _serves(existing, fingerprint, config.experts.hosts):
                ray.kill(existing)
        options.remote(config_tree, index)


def stop_expert_hosts(namespace: str, num_hosts: int) -> None:
    """End the hosts of this cluster, those that there are."""
    for index in range(num_hosts):
        with contextlib.suppress(ValueError, RayError):
            host = ray.get_actor(actor_name(index), namespace=namespace)
            with contextlib.suppress(GetTimeoutError):
                ray.get(host.stop.remote(), timeout=_CALL_TIMEOUT_S)
            ray.kill(host)


def locate_host(namespace: str, index: int) -> HostEndpoint:
    """Where host `index` listens now.

    Raises:
        Unavailable: it is starting or away. MoesaicError: it could not start, and why.
    """
    try:
        host = ray.get_actor(actor_name(index), namespace=namespace)
        endpoint: Any = ray.get(host.endpoint.remote(), timeout=_CALL_TIMEOUT_S)
        return endpoint
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, MoesaicError) else Unavailable(str(error)) from error
    except (ValueError, RayError) as error:
        raise Unavailable(f"expert host {index} is not there: {type(error).__name__}") from error


class ExpertHostsClient:
    """Asks the hosts for what pages show."""

    def __init__(self, namespace: str, num_hosts: int) -> None:
        self._namespace = namespace
        self._num_hosts = num_hosts

    async def statuses(self) -> tuple[ExpertHostStatus, ...]:
        """What each host says of itself; one that does not answer is shown as failed."""
        return tuple(
            _away(index, answer) if isinstance(answer, BaseException) else answer
            for index, answer in enumerate(await self._ask("status"))
        )

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        """Residency of each host that answers."""
        return tuple(answer for answer in await self._ask("experts_report") if isinstance(answer, ExpertsReport))

    async def _ask(self, method: str) -> Sequence[Any]:
        calls = (self._call(index, method) for index in range(self._num_hosts))
        return await asyncio.gather(*calls, return_exceptions=True)

    async def _call(self, index: int, method: str) -> Any:
        host = await asyncio.to_thread(ray.get_actor, actor_name(index), self._namespace)
        async with asyncio.timeout(_CALL_TIMEOUT_S - 1):
            return await getattr(host, method).remote()


def _serves(host: Any, fingerprint: str, num_hosts: int) -> bool:
    try:
        return ray.get(host.serves.remote(fingerprint, num_hosts), timeout=_CALL_TIMEOUT_S)
    except RayError:
        return True  # busy starting, or being restarted: workers find out by the handshake


def _away(index: int, error: BaseException) -> ExpertHostStatus:
    return ExpertHostStatus(
        host_id=f"host-{index}",
        phase=StartupPhase.FAILED,
        error=f"does not answer: {type(error).__name__}",
        epoch=0,
        owned=0,
        num_connections=0,
        num_frames=0,
        num_rows=0,
        num_batches=0,
        num_refused=0,
        busy_s=0.0,
        expert_memory=None,
    )
