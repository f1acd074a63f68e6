"""Ray's side of the scheduler: the named actor around it, how it is started, replaced and ended.

Ray restarts it on whatever node there is; what it has to know it finds in the store and in the next reports. Calls run
in threads, so that none waits for another; what talks to the store has a thread of its own. Light: it imports no torch.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError

from actors.ray_shells.application_watch import ApplicationWatch
from actors.ray_shells.host_calls import RayHosts, expert_hosts
from actors.ray_shells.named_actors import ActorKind, DetachedActors
from actors.ray_shells.scheduler_client import Claim, agreed_digest
from cluster.config.load import MoesaicConfig
from cluster.config.sizes import parse_size
from cluster.control.host_scaler import HostScaler
from cluster.control.knowledge_learner import KnowledgeLearner
from cluster.control.migrator import MigrationRunner
from cluster.control.nodes import find_node
from cluster.control.placer import HostPlacer
from cluster.control.scheduler import Scheduler
from cluster.deployed_spec import DeployedSpec
from cluster.errors import MoesaicError
from cluster.logs import configure_logging
from cluster.periodic import Pace, PeriodicLoop
from cluster.placement.plan import Placement, PlacementPlan
from cluster.scaling.rules import ScalingRules, host_rules
from cluster.scaling.spread import usable_nodes
from cluster.stats.open_store import open_store
from cluster.status.diagnosis import Diagnosis
from cluster.status.reports import HostReport, RoutingView, WorkerDirectives, WorkerReport
from cluster.status.scheduler import DrainLine, SchedulerStatus

_LOG = logging.getLogger(__name__)
_TURN_S = 1.0
_THREADS = 32  # calls at a time
_ADOPT_TIMEOUT_S = 15.0
_STOP_TIMEOUT_S = 3.0


class SchedulerActor:
    """Ray actor around one Scheduler."""

    def __init__(self, spec: DeployedSpec) -> None:
        configure_logging()
        config, application, fingerprint = spec.config, spec.application, spec.fingerprint
        store = open_store(spec.redis_url, application)
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
            number = config.experts.hosts
            scaler = HostScaler(
                host_rules(config) or ScalingRules(least=number, most=number),
                start=partial(_start_host, spec),
                stop=lambda index: expert_hosts(application).end(str(index)),
                nodes=lambda: usable_nodes(ray.nodes(), config.ray.host_resources),
            )
        self._scheduler = Scheduler(
            config.scheduler, fingerprint=fingerprint, store=store, learner=learner, placer=placer, scaler=scaler
        )
        self._loop = PeriodicLoop(self._scheduler.turn, Pace("scheduler", interval_s=_TURN_S))
        self._loop.start()
        self._watch = ApplicationWatch(application, agreed_digest(spec), on_gone=self.stop)
        self._watch.start()

    def adopt(self, served_as: str | None, digest: str) -> bool:
        return self._watch.adopt(served_as, digest)

    def claim(self, claim: Claim) -> None:
        self._watch.claim(*claim)

    def owner(self) -> str | None:
        return self._watch.owner

    def report_worker(self, report: WorkerReport, claim: Claim) -> WorkerDirectives:
        self._watch.claim(*claim)
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
        """Args: node: as a person names it (find_node); one that is drained already may be gone."""
        return self._scheduler.drain(find_node(node, ray.nodes(), known=self._scheduler.draining))

    def undrain(self, node: str) -> DrainLine:
        """Args: as of drain; the node may be gone."""
        return self._scheduler.undrain(find_node(node, ray.nodes(), known=self._scheduler.draining))

    def stop(self) -> None:
        """Do nothing more in the background; waits for what is under way."""
        self._loop.stop(_STOP_TIMEOUT_S)


def _make_runner(
    config: MoesaicConfig,
    placement: Placement,
    on_publish: Callable[[Placement], None],
    worker_epochs: Callable[[], Mapping[str, int]],
) -> MigrationRunner:
    return MigrationRunner(
        RayHosts(config.ray.application_id),
        placement,
        on_publish=on_publish,
        worker_epochs=worker_epochs,
        bytes_per_s=parse_size(config.scheduler.moved_per_minute) / 60,
    )


def _start_host(spec: DeployedSpec, index: int, node: str | None) -> None:
    from actors.ray_shells.host_actor import start_expert_host

    start_expert_host(spec, index, node=node)


def begin_deployment(spec: DeployedSpec, served_as: str | None) -> None:
    """Call before anything of a deployment is started: from now on, what there is already isn't ended for want of an
    application.

    Args:
        spec: its store need not be known yet.
        served_as: Serve's name of it; None: not known.
    Raises:
        ConfigError: the application is another deployment's; says what to set.
    """
    schedulers = DetachedActors(spec.application, ActorKind.SCHEDULER)
    try:
        existing: Any = schedulers.find()
        goes_on = ray.get(existing.adopt.remote(served_as, agreed_digest(spec)), timeout=_ADOPT_TIMEOUT_S)
    except ValueError:
        return
    except RayTaskError as error:
        raise error.cause if isinstance(error.cause, MoesaicError) else error from error
    except GetTimeoutError:
        return  # it starts: then it is in no hurry to end anything
    except RayError:
        goes_on = False
    if not goes_on:
        schedulers.end()


def start_scheduler(spec: DeployedSpec) -> None:
    """Start the scheduler of a deployment, in the place of one of another; returns at once."""
    DetachedActors(spec.application, ActorKind.SCHEDULER).start(
        SchedulerActor, "", agreed_digest(spec) + spec.digest(store=True), spec, max_concurrency=_THREADS
    )
