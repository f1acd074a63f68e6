"""When the placement is planned, begun, remembered and found again."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pytest
from scheduler_values import LAYERS, NUM_EXPERTS, host_report, worker_report

from cluster.config.sections import SchedulerConfig
from cluster.control.placer import HostPlacer
from cluster.control.roster import Roster
from cluster.errors import Superseded, Unavailable
from cluster.placement.migration import MigrationPhase
from cluster.placement.plan import Placement
from cluster.placement.state import first_placement
from cluster.protocols import StateStore
from cluster.semantics.statistics import COUNT, DECODE, ExpertStatistics, no_statistics
from cluster.stats.memory_store import MemoryStore
from cluster.types import StartupPhase


@dataclass
class _Status:
    phase: MigrationPhase = MigrationPhase.IDLE
    reason: str = ""
    stages_left: int = 0
    planned_bytes: int = 0
    moved_bytes: int = 0


class _Runner:
    """Notes what is to be carried out."""

    def __init__(self, placement: Placement, on_publish: Callable[[Placement], None]) -> None:
        self.placement = placement
        self.on_publish = on_publish
        self.targets: list[Placement] = []
        self.current = _Status()

    def begin(self) -> None: ...

    def start(self, target: Placement, *, capacities: Mapping[int, int], expert_bytes: int) -> bool:
        self.targets.append(target)
        self.current = _Status(phase=MigrationPhase.PREPARING, planned_bytes=2000, moved_bytes=500, stages_left=1)
        return True

    def status(self) -> _Status:
        return self.current

    is_closed = False

    def close(self) -> None:
        self.is_closed = True

    def publish(self) -> None:
        """The migration under way has ended well."""
        target = self.targets[-1]
        self.placement = Placement(epoch=self.placement.epoch + 1, hosts=target.hosts)
        self.current = _Status(phase=MigrationPhase.DONE, planned_bytes=2000, moved_bytes=2000)
        self.on_publish(self.placement)


class _Case:
    """A placer over `hosts`, whose first host has nearly all the load."""

    def __init__(self, store: StateStore | None = None) -> None:
        self.runner: _Runner | None = None
        self.roster = Roster(silence_s=10.0)
        self.statistics: ExpertStatistics | None = _skewed()
        self.placer = HostPlacer(
            SchedulerConfig(placement_interval_s=60.0),
            fingerprint="f",
            store=MemoryStore() if store is None else store,
            num_hosts=2,
            statistics=lambda: self.statistics,
            make_runner=self._make,
        )

    def _make(self, placement: Placement, on_publish: Callable[[Placement], None], worker_epochs: object) -> _Runner:
        self.runner = _Runner(placement, on_publish)
        return self.runner

    def report(self, now_s: float, *hosts: int, **values: object) -> None:
        self.roster.note_worker(worker_report(), now_s)
        for index in hosts:
            node = f"node-{index}"
            self.roster.note_host(host_report(index, node_id=node, expert_s=0.01, row_s=1e-4, **values), now_s)

    def turn(self, now_s: float) -> list[Placement]:
        """Targets so far."""
        self.placer.turn(self.roster, now_s)
        return [] if self.runner is None else self.runner.targets


def _skewed() -> ExpertStatistics:
    statistics = no_statistics(0, 0, LAYERS, NUM_EXPERTS)
    owned = first_placement(LAYERS, NUM_EXPERTS, 2).hosts[0]
    for row, layer in enumerate(LAYERS):
        statistics.values[-1, DECODE, row, :, COUNT] = 10_000.0
        statistics.values[-1, DECODE, row, list(owned[layer]), COUNT] = 1_000_000.0
    return statistics


class _TakenStore(MemoryStore):
    """Another scheduler's."""

    def put_state(self, fingerprint: str, name: str, blob: bytes, version: int) -> bool:
        raise Superseded("another scheduler writes")


def test_a_superseded_scheduler_tells_hosts_nothing_of_its_placement() -> None:
    case = _Case(_TakenStore())
    case.report(0.0, 0, 1)
    case.turn(0.0)
    assert case.runner is not None

    with pytest.raises(Superseded):
        case.runner.publish()  # the runner's thread stops here, before it tells hosts
    assert case.runner.is_closed


def test_a_skewed_load_is_levelled_once_and_shown() -> None:
    case = _Case()
    case.report(0.0, 0, 1)

    (target,) = case.turn(0.0)

    assert case.runner is not None
    assert case.runner.placement == first_placement(LAYERS, NUM_EXPERTS, 2)
    assert target.hosts != case.runner.placement.hosts
    case.report(61.0, 0, 1)
    case.turn(61.0)
    assert len(case.runner.targets) == 1, "a migration is under way"
    line = case.placer.line(0.0)
    assert (line.num_plans, line.num_migrations, line.epoch) == (1, 1, 1)
    assert line.migration == "preparing: 500 of 2000 bytes, 1 epochs to come"
    assert line.balance is not None
    assert line.balance > 1.5

    case.runner.publish()
    case.turn(62.0)

    line = case.placer.line(0.0)
    assert (line.epoch, line.bytes_moved, line.migration) == (2, 2000, "")


def test_a_published_placement_is_remembered() -> None:
    store = MemoryStore()
    first = _Case(store)
    first.report(0.0, 0, 1)
    first.turn(0.0)
    assert first.runner is not None
    first.runner.publish()

    second = _Case(store)
    second.report(0.0, 0, 1, epochs=(1, 2))
    second.turn(0.0)

    assert second.placer.placement == first.runner.placement


def test_where_it_was_forgotten_hosts_get_a_number_they_never_had() -> None:
    case = _Case()
    case.report(0.0, 0, epochs=(4,))
    case.report(0.0, 1, epochs=(4, 5))

    case.turn(0.0)

    placement = case.placer.placement
    assert placement is not None
    assert placement.epoch > 5
    assert placement.hosts == first_placement(LAYERS, NUM_EXPERTS, 2).hosts


def test_nothing_is_planned_while_hosts_start_but_a_lost_one_is_given_up() -> None:
    case = _Case()
    case.report(0.0, 0)
    assert case.turn(0.0) == [], "host 1 has not reported yet"
    case.report(1.0, 1, phase=StartupPhase.LOADING)
    assert case.turn(1.0) == []
    with pytest.raises(Unavailable, match="starting"):
        case.placer.plan(case.roster, 1.0, statistics=case.statistics)
    case.report(100.0, 0)
    case.roster.forget_silent(100.0)

    (target,) = case.turn(100.0)

    everything = {layer: tuple(range(NUM_EXPERTS)) for layer in LAYERS}
    assert target.hosts[0] == everything
    assert not any(target.hosts.get(1, {}).values())


def test_a_drained_host_loses_its_experts_at_once() -> None:
    case = _Case()
    case.statistics = no_statistics(0, 0, LAYERS, NUM_EXPERTS)
    case.report(0.0, 0, 1)
    assert case.turn(0.0) == [], "nothing was asked of the experts yet"
    case.report(1.0, 0, 1)
    case.roster.set_draining(["node-1"])

    (target,) = case.turn(1.0)

    assert not any(target.hosts.get(1, {}).values())
    assert np.sum([len(experts) for experts in target.hosts[0].values()]) == len(LAYERS) * NUM_EXPERTS


def test_without_statistics_there_is_no_plan() -> None:
    case = _Case()
    case.statistics = None
    case.report(0.0, 0, 1)

    assert case.turn(0.0) == []
    with pytest.raises(Unavailable, match="what requests use"):
        case.placer.plan(case.roster, 0.0, statistics=case.statistics)


@pytest.mark.parametrize("has_statistics", [True, False])
def test_a_node_is_emptied_and_filled_again_at_once_without_any_request(has_statistics: bool) -> None:
    case = _Case()
    if has_statistics:  # level, so that there is nothing to gain
        case.statistics = no_statistics(0, 0, LAYERS, NUM_EXPERTS)
        case.statistics.values[-1, DECODE, :, :, COUNT] = 1.0
    else:
        case.statistics = None
    case.report(0.0, 0, 1)
    assert case.turn(0.0) == []

    case.roster.set_draining({"node-1"})
    emptied = case.turn(1.0)[-1]
    assert set(emptied.hosts) == {0}
    assert case.runner is not None
    case.runner.publish()
    case.roster.set_draining(())
    case.turn(2.0)  # the migration has ended
    filled = case.turn(3.0)[-1]

    counts = {index: sum(map(len, layers.values())) for index, layers in filled.hosts.items()}
    assert counts == {0: len(LAYERS) * NUM_EXPERTS // 2, 1: len(LAYERS) * NUM_EXPERTS // 2}
