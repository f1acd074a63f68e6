"""Ray's side of expert hosts: the actor around an ExpertHost, starting and ending them, finding and asking them.

Hosts are named, detached and restarted by Ray; whoever needs one looks it up by its number. They come and go while
others serve. Every `.remote` to a host but the actor-call carrier's is here or in actors/ray_shells/host_calls.py.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from actors.data_plane.channel import HostEndpoint
from actors.ray_shells.host_calls import RayPeers, expert_hosts, find_host, host_indices
from actors.ray_shells.scheduler_client import SchedulerLink
from cluster.application import ApplicationId
from cluster.control.report_loop import ReportLoop
from cluster.deployed_spec import DeployedSpec
from cluster.errors import MoesaicError, Unavailable
from cluster.logs import configure_logging
from cluster.model.info import read_model_info
from cluster.placement.migration import HostCommand, HostEpochs
from cluster.scaling.spread import deal_nodes, usable_nodes
from cluster.status.experts import ExpertsReport
from cluster.status.host import ExpertHostStatus
from cluster.status.reports import HostReport
from cluster.types import ExpertId, StartupPhase

if TYPE_CHECKING:
    import numpy as np

_CALL_TIMEOUT_S = 5.0
_THREADS = 16  # calls at a time; an actor-call dispatch blocks one


class ExpertHostActor:
    """Ray actor around one ExpertHost."""

    def __init__(self, spec: DeployedSpec, index: int) -> None:
        from actors.expert_host.host import ExpertHost

        configure_logging()
        logging.getLogger("transformers").setLevel(logging.ERROR)
        config = spec.config
        info = read_model_info(config.model)  # workers refuse another one in the handshake
        node_id, peers = ray.get_runtime_context().get_node_id(), RayPeers(spec.application)
        self._host = ExpertHost(config, info, index, node_id=node_id, peers=peers, num_nodes=num_nodes())
        self._host.start(ray.util.get_node_ip_address())
        link = SchedulerLink(spec.application)
        self._reports = ReportLoop(
            lambda: link.report_host(self._host.report()), interval_s=config.scheduler.report_interval_s
        )
        self._reports.start()

    def endpoint(self) -> HostEndpoint:
        """Where workers connect; raises while it starts."""
        context = ray.get_runtime_context()
        name = context.get_actor_name() or ""
        return replace(self._host.endpoint(), actor_name=name, actor_namespace=context.namespace)

    def welcome_json(self, worker_id: str, fingerprint: str) -> dict[str, object]:
        """Handshake of the actor-call carrier."""
        return self._host.welcome_json(worker_id, fingerprint)

    def hear_outlook(self, worker_id: str, data: bytes) -> None:
        """What a worker expects of this host's experts."""
        self._host.hear_outlook(worker_id, data)

    def dispatch(self, data: bytes) -> bytes:
        """One frame of the actor-call carrier."""
        return self._host.dispatch(data)

    def status(self) -> ExpertHostStatus:
        """What the host says of itself."""
        return replace(self._host.status(), degraded=self._reports.degraded)

    def experts_report(self) -> ExpertsReport:
        """Residency per layer."""
        return self._host.experts_report()

    def report(self) -> HostReport:
        """What the host tells the scheduler."""
        return self._host.report()

    def epochs(self) -> HostEpochs:
        """How far it is with the epochs it was told of."""
        return self._host.epochs()

    def tell(self, command: HostCommand) -> HostEpochs:
        """Follow a command of a migration, or begin to."""
        return self._host.tell(command)

    def expert_bytes(self, form: str, expert: ExpertId) -> tuple[np.ndarray, int]:
        """An expert's bytes and their checksum, for another host; they travel through Ray's object store."""
        return self._host.expert_bytes(form, expert)

    def checksums(self, form: str, experts: list[ExpertId]) -> dict[ExpertId, int]:
        """Of those that are in memory."""
        return self._host.checksums(form, experts)

    def stop(self) -> None:
        """End connections and compute."""
        self._reports.stop()
        self._host.stop()


def start_expert_hosts(spec: DeployedSpec) -> None:
    """Start the configured hosts, each in the place of one of another deployment, and end all others of one;
    returns at once."""
    experts, resources = spec.config.experts, spec.config.ray.host_resources
    for index, node in enumerate(deal_nodes(usable_nodes(ray.nodes(), resources), experts.hosts)):
        start_expert_host(spec, index, node=node)
    hosts = expert_hosts(spec.application)  # load may have started more of them
    hosts.keep_only(dict.fromkeys(hosts.list_keys(), _digest(spec)) if experts.hosts else {})


def start_expert_host(spec: DeployedSpec, index: int, *, node: str | None = None) -> None:
    """Start host `index` if there is none of this deployment; returns at once. One beyond those configured owns nothing
    until a placement gives it experts. Args: node: id of where it had better be; Ray's own spreading puts two on one
    node now and then."""
    expert_hosts(spec.application).start(
        ExpertHostActor,
        str(index),
        _digest(spec),
        spec,
        index,
        resources=spec.config.ray.host_resources or None,
        scheduling_strategy="SPREAD" if node is None else NodeAffinitySchedulingStrategy(node, soft=True),
        max_concurrency=_THREADS,
    )


def _digest(spec: DeployedSpec) -> str:
    return spec.digest("attention", "experts", "scheduler")  # attention: threads are shared out


def locate_host(application: ApplicationId, index: int) -> HostEndpoint:
    """Where host `index` listens now.

    Raises:
        Unavailable: it is starting or away. MoesaicError: it could not start, and why.
    """
    try:
        host: Any = find_host(application, index)
        endpoint: Any = ray.get(host.endpoint.remote(), timeout=_CALL_TIMEOUT_S)
        return endpoint
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, MoesaicError) else Unavailable(str(error)) from error
    except (ValueError, RayError) as error:
        raise Unavailable(f"expert host {index} is not there: {type(error).__name__}") from error


def num_nodes() -> int:
    """Nodes that Ray has now; at least one."""
    return max(1, sum(node["Alive"] for node in ray.nodes()))


class ExpertHostsClient:
    """Asks the hosts for what pages show."""

    def __init__(self, application: ApplicationId, num_hosts: int) -> None:
        """Args: num_hosts: configured ones; 0: there are none to ask."""
        self._application = application
        self._num_hosts = num_hosts

    async def statuses(self) -> tuple[ExpertHostStatus, ...]:
        """What each host says of itself; one that does not answer is shown as failed."""
        return tuple(
            _away(index, answer) if isinstance(answer, BaseException) else answer
            for index, answer in await self._ask("status")
        )

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        """Residency of each host that answers."""
        return tuple(answer for _, answer in await self._ask("experts_report") if isinstance(answer, ExpertsReport))

    async def _ask(self, method: str) -> Sequence[tuple[int, Any]]:
        if not self._num_hosts:
            return ()
        indices = await asyncio.to_thread(host_indices, self._application)
        answers = await asyncio.gather(*(self._call(index, method) for index in indices), return_exceptions=True)
        return list(zip(indices, answers, strict=True))

    async def _call(self, index: int, method: str) -> Any:
        host = await asyncio.to_thread(find_host, self._application, index)
        async with asyncio.timeout(_CALL_TIMEOUT_S - 1):
            return await getattr(host, method).remote()


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
