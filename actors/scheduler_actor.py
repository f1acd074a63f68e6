"""Ray's side of the scheduler: the named actor around it, how it is started, replaced and ended.

Ray restarts it on whatever node there is; what it has to know it finds in the store and in the next reports. Calls run
in threads, so that none waits for another; what talks to the store has a thread of its own. Light: it imports no torch.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import GetTimeoutError, RayError

from actors.expert_host_calls import RayHosts
from actors.host_scaler import HostScaler
from actors.knowledge_learner import KnowledgeLearner
from actors.migration import MigrationRunner
from actors.placer import HostPlacer
from actors.scheduler import Scheduler
from actors.scheduler_link import SCHEDULER_ACTOR
from cluster.config import MoesaicConfig, from_tree
from cluster.observability.logs import configure_logging, log_event
from cluster.scheduler.diagnose import Diagnosis
from cluster.scheduler.nodes import find_node
from cluster.scheduler.plan import Placement, PlacementPlan
from cluster.scheduler.reports import HostReport, RoutingView, WorkerDirectives, WorkerReport
from cluster.scheduler.scaling import host_rules
from cluster.scheduler.status import DrainLine, SchedulerStatus
from cluster.sizes import parse_size
from cluster.stats.open_store import open_store

_LOG = logging.getLogger(__name__)
_TURN_S = 1.0
_THREADS = 32  # calls at a time
_CALL_TIMEOUT_S = 5.0


class SchedulerActor:
    """Ray actor around one Scheduler."""

    def __init__(self, config_tree: dict[str, Any], fingerprint: str, redis_url: str | None) -> None:
        configure_logging()
        self._made_of = (config_tree, fingerprint, redis_url)
        config = from_tree(config_tree)
        store = open_store(redis_url)
        learner = KnowledgeLearner(store, fingerprint, config.scheduler, time.monotonic)
        placer: HostPlacer | None = None
        scaler: HostScaler | None = None
        if config.experts.hosts and config.scheduler.placement == "auto":
            placer = HostPlacer(
                config.scheduler,
                fingerprint=fingerprint,
                store=store,
                num_hosts=config.experts.hosts,
                statistics=lambda: learner.statistics,
                make_runner=partial(_make_runner, config),
            )
            rules = host_rules(config)
            if rules is not None:
                scaler = HostScaler(
                    rules,
                    start=partial(_start_host, config, config_tree),
                    stop=partial(_stop_host, config.ray.namespace),
                )
        self._scheduler = Scheduler(
            config.scheduler, fingerprint=fingerprint, store=store, learner=learner, placer=placer, scaler=scaler
        )
        self._thread = threading.Thread(target=self._run, name="scheduler", daemon=True)
        self._thread.start()

    def is_made_of(self, config_tree: dict[str, Any], fingerprint: str, redis_url: str | None) -> bool:
        """Whether this scheduler was started for this configuration, model and store."""
        return self._made_of == (config_tree, fingerprint, redis_url)

    def report_worker(self, report: WorkerReport) -> WorkerDirectives:
        return self._scheduler.report_worker(report)

    def report_host(self, report: HostReport) -> None:
        self._scheduler.report_host(report)

    def routing_view(self, known_version: int) -> RoutingView:
        return self._scheduler.routing_view(known_version)

    def status(self) -> SchedulerStatus:
        return self._scheduler.status()

    def plan(self) -> PlacementPlan:
        return self._scheduler.plan()

    def diagnose(self) -> Diagnosis:
        return self._scheduler.diagnose()

    def drain(self, node: str) -> DrainLine:
        """Args: node: as a person names it (find_node)."""
        return self._scheduler.drain(find_node(node, ray.nodes()))

    def undrain(self, node: str) -> DrainLine:
        """Args: as of drain; the node may be gone."""
        return self._scheduler.undrain(find_node(node, ray.nodes(), known=self._scheduler.draining))

    def _run(self) -> None:
        while True:
            try:
                self._scheduler.turn()
            except Exception as error:  # noqa: BLE001 - top loop: reports and routing go on, whatever it is
                log_event(_LOG, logging.ERROR, "a turn of the scheduler failed", error=error)
            time.sleep(_TURN_S)


def _make_runner(
    config: MoesaicConfig,
    placement: Placement,
    on_publish: Callable[[Placement], None],
    worker_epochs: Callable[[], Mapping[str, int]],
) -> MigrationRunner:
    return MigrationRunner(
        RayHosts(config.ray.namespace),
        placement,
        on_publish=on_publish,
        worker_epochs=worker_epochs,
        bytes_per_s=parse_size(config.scheduler.moved_per_minute) / 60,
    )


def _start_host(config: MoesaicConfig, config_tree: dict[str, Any], index: int) -> None:
    from actors.expert_host_actor import start_expert_host

    start_expert_host(config, config_tree, index)


def _stop_host(namespace: str, index: int) -> None:
    from actors.expert_host_actor import stop_expert_host

    stop_expert_host(namespace, index)


def start_scheduler(
    config: MoesaicConfig, config_tree: dict[str, Any], fingerprint: str, redis_url: str | None
) -> None:
    """Start the scheduler of a configuration, in the place of one of another configuration; returns at once."""
    actor_class: Any = ray.remote(SchedulerActor)
    namespace = config.ray.namespace
    with contextlib.suppress(ValueError):
        existing = ray.get_actor(SCHEDULER_ACTOR, namespace=namespace)
        if not _is_made_of(existing, config_tree, fingerprint, redis_url):
            ray.kill(existing)
    actor_class.options(
        name=SCHEDULER_ACTOR,
        namespace=namespace,
        lifetime="detached",
        get_if_exists=True,
        num_cpus=0,
        max_restarts=-1,
        max_concurrency=_THREADS,
    ).remote(config_tree, fingerprint, redis_url)


def stop_scheduler(namespace: str) -> None:
    """End the scheduler of this cluster, if there is one."""
    with contextlib.suppress(ValueError, RayError):
        ray.kill(ray.get_actor(SCHEDULER_ACTOR, namespace=namespace))


def _is_made_of(actor: ActorHandle, *made_of: object) -> bool:
    try:
        return bool(ray.get(actor.is_made_of.remote(*made_of), timeout=_CALL_TIMEOUT_S))
    except GetTimeoutError:
        return True  # busy starting, or being restarted
    except RayError:
        return False
