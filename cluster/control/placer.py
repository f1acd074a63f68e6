"""Keeps the placement of experts on hosts: plans now and then, has plans carried out, remembers what is published.

Plans are pure (cluster/scheduler/placement), migrations are the runner's; this says when. A plan is due every
`placement_interval_s`, and at once when a host is lost, drains or joins. Nothing is planned while hosts start: they
would look lost.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Protocol

from cluster.config.sections import SchedulerConfig
from cluster.config.sizes import parse_size
from cluster.control.planning_inputs import placement_inputs
from cluster.control.roster import Roster
from cluster.errors import Superseded, Unavailable
from cluster.logs import log_event
from cluster.placement.inputs import PlacementInputs
from cluster.placement.migration import MigrationPhase
from cluster.placement.plan import Placement, PlacementPlan
from cluster.placement.planner import plan_placement
from cluster.placement.state import first_placement, placement_from_bytes, placement_to_bytes
from cluster.protocols import StateStore
from cluster.semantics.statistics import ExpertStatistics, no_statistics
from cluster.status.scheduler import PlacementLine
from cluster.types import StartupPhase

_LOG = logging.getLogger(__name__)
_PLACEMENT = "placement"
_PATIENCE_S = 60.0  # for hosts that start, before it is planned without them


class MigrationProgress(Protocol):
    """What of a runner's status counts here."""

    @property
    def phase(self) -> MigrationPhase: ...
    @property
    def reason(self) -> str: ...
    @property
    def stages_left(self) -> int: ...
    @property
    def planned_bytes(self) -> int: ...
    @property
    def moved_bytes(self) -> int: ...


class MigrationControl(Protocol):
    """Carries plans out (cluster/control/migrator.py)."""

    @property
    def placement(self) -> Placement: ...

    def begin(self) -> None: ...

    def start(self, target: Placement, *, capacities: Mapping[int, int], expert_bytes: int) -> bool: ...

    def status(self) -> MigrationProgress: ...

    def close(self) -> None: ...


MakeRunner = Callable[[Placement, Callable[[Placement], None], Callable[[], Mapping[str, int]]], MigrationControl]


class HostPlacer:
    """A `Placer` over expert hosts. `turn` belongs to one thread; the rest to any."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        fingerprint: str,
        store: StateStore,
        num_hosts: int,
        statistics: Callable[[], ExpertStatistics | None],
        make_runner: MakeRunner,
    ) -> None:
        """Args: statistics: the last that were read. make_runner: from a placement, who remembers one that takes
        effect, and the epochs that workers follow."""
        self._config = config
        self._fingerprint = fingerprint
        self._store = store
        self._num_hosts = num_hosts
        self._statistics = statistics
        self._make_runner = make_runner
        self._lock = threading.Lock()
        self._runner: MigrationControl | None = None
        self._worker_epochs: Mapping[str, int] = {}
        self._unsaved: Placement | None = None
        self._began_s: float | None = None
        self._due_s = 0.0
        self._planned_for: frozenset[tuple[int, bool]] | None = None
        self._was_under_way = False
        self._line = PlacementLine(epoch=0)
        self._planned_s: float | None = None

    @property
    def placement(self) -> Placement | None:
        """The published one; None until it is known."""
        runner = self._runner
        return None if runner is None else runner.placement

    def turn(self, roster: Roster, now_s: float) -> None:
        """Restore, plan and begin to migrate, whatever is due. Raises ConnectionError while the store is away."""
        self._began_s = now_s if self._began_s is None else self._began_s
        self._worker_epochs = {report.worker_id: report.placement_epoch for report, _ in roster.workers(now_s)}
        runner = self._runner or self._restore(roster, now_s)
        if runner is None:
            return
        self._follow()
        self._save()
        hosts = frozenset((report.index, roster.is_leaving(report)) for report, _ in roster.hosts(now_s))
        if (now_s < self._due_s and hosts == self._planned_for) or not self._all_started(roster, now_s):
            return
        if self._was_under_way:
            return
        statistics = self._or_nothing_counted(self._statistics(), roster, now_s)
        if statistics is None:
            return
        self._due_s, self._planned_for = now_s + self._config.placement_interval_s, hosts
        self._unsaved = runner.placement  # once more: a store that was restarted has forgotten it
        self._apply(self._inputs(roster, statistics, now_s), roster, now_s)

    def plan(self, roster: Roster, now_s: float, *, statistics: ExpertStatistics | None) -> PlacementPlan:
        """What would be done now, by these statistics.

        Raises:
            Unavailable: not enough is known yet.
        """
        counted = statistics
        statistics = self._or_nothing_counted(counted, roster, now_s)
        if self._runner is None or statistics is None:
            missing = "which hosts have which experts" if self._runner is None else "what requests use"
            raise Unavailable(f"the scheduler does not know yet {missing}; try again later")
        if not self._all_started(roster, now_s):
            raise Unavailable("expert hosts are starting; nothing is planned until they are ready")
        plan = plan_placement(self._inputs(roster, statistics, now_s))
        if counted is None and not plan.applies:
            raise Unavailable("the scheduler does not know yet what requests use; try again later")
        return plan

    def line(self, now_s: float) -> PlacementLine:
        """For pages."""
        age_s = None if self._planned_s is None else now_s - self._planned_s
        return replace(self._line, plan_age_s=age_s)

    def close(self) -> None:
        """End what runs in the background."""
        if self._runner is not None:
            self._runner.close()

    def _or_nothing_counted(
        self, statistics: ExpertStatistics | None, roster: Roster, now_s: float
    ) -> ExpertStatistics | None:
        """What was counted; zeros before anybody asked: a node is emptied, and a host filled, without any request."""
        if statistics is not None:
            return statistics
        facts = next((report for report, _ in roster.workers(now_s) if report.layers), None)
        return None if facts is None else no_statistics(0, 0, facts.layers, facts.num_experts)

    def _inputs(self, roster: Roster, statistics: ExpertStatistics, now_s: float) -> PlacementInputs:
        assert self._runner is not None
        per_minute = parse_size(self._config.moved_per_minute)
        return placement_inputs(
            roster,
            statistics,
            self._runner.placement,
            half_life_s=self._config.half_life_s,
            max_bytes=int(per_minute * self._config.placement_interval_s / 60),
            bytes_per_s=per_minute / 60,
            now_s=now_s,
        )

    def _apply(self, inputs: PlacementInputs, roster: Roster, now_s: float) -> None:
        assert self._runner is not None
        plan = plan_placement(inputs)
        is_begun = plan.applies and self._runner.start(
            plan.placement,
            capacities={report.index: report.capacity for report, _ in roster.hosts(now_s)},
            expert_bytes=inputs.expert_bytes,
        )
        self._was_under_way = self._was_under_way or is_begun
        if plan.applies:
            log_event(
                _LOG, logging.INFO, "placement changes", begun=is_begun, moves=len(plan.moves), reason=plan.reason
            )
        self._planned_s = now_s
        self._line = replace(
            self._line,
            num_plans=self._line.num_plans + 1,
            num_migrations=self._line.num_migrations + is_begun,
            balance=plan.balance_now,
            reason=plan.reason,
        )

    def _follow(self) -> None:
        """Bring the line up to the runner's status."""
        assert self._runner is not None
        status = self._runner.status()
        is_under_way = status.phase in (MigrationPhase.PREPARING, MigrationPhase.SWITCHING)
        has_ended = self._was_under_way and not is_under_way
        self._was_under_way = is_under_way
        told = (
            f"{status.phase}: {status.moved_bytes} of {status.planned_bytes} bytes, {status.stages_left} epochs to come"
        )
        self._line = replace(
            self._line,
            epoch=self._runner.placement.epoch,
            num_aborted=self._line.num_aborted + (has_ended and status.phase is MigrationPhase.ABORTED),
            bytes_moved=self._line.bytes_moved + (status.moved_bytes if has_ended else 0),
            migration=told if is_under_way else "",
        )

    def _all_started(self, roster: Roster, now_s: float) -> bool:
        """Whether every host that is placed reports and is ready, or had its time to."""
        assert self._runner is not None
        phases = {report.index: report.phase for report, _ in roster.hosts(now_s)}
        ready = {index for index, phase in phases.items() if phase is StartupPhase.READY}
        if any(
            phase not in (StartupPhase.READY, StartupPhase.FAILED) for phase in phases.values()
        ):  # it reports, so it comes: its experts would be moved away and back
            return False
        began_s = now_s if self._began_s is None else self._began_s
        return set(self._runner.placement.hosts) <= ready or now_s - began_s > _PATIENCE_S

    def _restore(self, roster: Roster, now_s: float) -> MigrationControl | None:
        """Go on with the remembered placement, else with the one that hosts start with; None: not known yet."""
        facts = next((report for report, _ in roster.workers(now_s) if report.layers), None)
        hosts = roster.hosts(now_s)
        if facts is None or not hosts:
            return None
        state = self._store.get_state(self._fingerprint, _PLACEMENT)
        placement: Placement | None = None
        if state is not None:
            try:
                placement = placement_from_bytes(state.blob)
            except (ValueError, KeyError, TypeError, AttributeError) as error:
                log_event(_LOG, logging.WARNING, "remembered placement cannot be read", reason=repr(error))
        seen = max(max(report.epochs, default=1) for report, _ in hosts)
        if placement is None or (placement.epoch < seen and not any(placement.epoch in r.epochs for r, _ in hosts)):
            # What hosts follow is forgotten. They are brought back to the first one, under a number of its own.
            epoch = 1 if seen <= 1 else seen + 1
            placement = first_placement(facts.layers, facts.num_experts, self._num_hosts, epoch=epoch)
        self._runner = runner = self._make_runner(placement, self._on_publish, lambda: self._worker_epochs)
        runner.begin()
        return runner

    def _on_publish(self, placement: Placement) -> None:
        """Remember it; called by the runner's thread before hosts are told."""
        with self._lock:
            self._unsaved = placement
        try:
            self._save()
        except Superseded:  # before hosts are told: the one that took over will see what they have
            if self._runner is not None:
                self._runner.close()
            raise
        except ConnectionError as error:
            log_event(
                _LOG, logging.WARNING, "a placement is not remembered yet", epoch=placement.epoch, reason=str(error)
            )

    def _save(self) -> None:
        with self._lock:
            placement = self._unsaved
        if placement is None:
            return
        self._store.put_state(self._fingerprint, _PLACEMENT, placement_to_bytes(placement), placement.epoch)
        with self._lock:
            if self._unsaved is placement:
                self._unsaved = None
