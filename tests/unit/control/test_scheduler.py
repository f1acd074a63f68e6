"""The scheduler's memory: who reported, what is news to whom, what outlives it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import MEMORY
from scheduler_values import TOP_K, host_report, knowledge, worker_report

from cluster.config.sections import SchedulerConfig
from cluster.control.scheduler import Scheduler
from cluster.errors import NothingToChange, Superseded
from cluster.finite import with_finite_numbers
from cluster.placement.plan import Placement
from cluster.protocols import StateStore, VersionedState
from cluster.semantics.knowledge import Knowledge
from cluster.stats.memory_store import MemoryStore
from cluster.types import StartupPhase, Tier


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


class _Learner:
    """Has something new whenever `has_news`."""

    def __init__(self) -> None:
        self.has_news = True
        self.asked: list[tuple[int, int, int]] = []

    statistics = None

    def learn(self, version: int, *, top_k: int, seen_clusters: int) -> Knowledge | None:
        self.asked.append((version, top_k, seen_clusters))
        return knowledge(version) if self.has_news else None


class _Store(MemoryStore):
    """Shared, and away when told so."""

    away = False

    @property
    def is_shared(self) -> bool:
        return True

    def get_state(self, fingerprint: str, name: str) -> VersionedState | None:
        if self.away:
            raise ConnectionError("no route")
        return super().get_state(fingerprint, name)


def _scheduler(clock: _Clock, learner: _Learner | None = None, store: StateStore | None = None) -> Scheduler:
    return Scheduler(
        SchedulerConfig(),
        fingerprint="f",
        store=_Store() if store is None else store,
        learner=_Learner() if learner is None else learner,
        placer=None,
        clock=clock,
    )


class _FencedStore(_Store):
    """Refuses states once another scheduler writes."""

    is_taken = False
    num_fences = 0

    def take_fence(self, fingerprint: str) -> None:
        if self.away:
            raise ConnectionError("no route")
        self.num_fences += 1

    def put_state(self, fingerprint: str, name: str, blob: bytes, version: int) -> bool:
        if self.is_taken:
            raise Superseded("another scheduler writes")
        return super().put_state(fingerprint, name, blob, version)


def test_a_scheduler_that_was_superseded_decides_nothing_more_and_says_so() -> None:
    clock, learner, store = _Clock(), _Learner(), _FencedStore()
    scheduler = _scheduler(clock, learner, store)
    scheduler.report_worker(worker_report())
    scheduler.turn()
    assert store.num_fences == 1
    assert len(learner.asked) == 1

    store.is_taken = True
    scheduler.drain("node-z")
    for _ in range(5):
        clock.now_s += 1000
        scheduler.report_worker(worker_report())
        scheduler.turn()

    assert len(learner.asked) == 1
    assert store.num_fences == 1, "it does not take it back"
    assert "another scheduler writes" in " ".join(scheduler.status().degraded)
    assert scheduler.routing_view(0).workers, "requests are still routed"


def test_a_store_that_is_away_at_the_start_is_fenced_when_it_is_back() -> None:
    clock, store = _Clock(), _FencedStore()
    scheduler = _scheduler(clock, store=store)
    store.away = True
    scheduler.turn()
    store.away = False
    scheduler.turn()
    scheduler.turn()
    assert store.num_fences == 1


def test_knowledge_reaches_each_worker_and_router_once() -> None:
    scheduler = _scheduler(_Clock())
    assert scheduler.report_worker(worker_report()).knowledge is None
    scheduler.turn()

    told = scheduler.report_worker(worker_report()).knowledge
    seen = scheduler.routing_view(0).knowledge

    assert told is not None
    assert seen is told
    assert scheduler.report_worker(worker_report(knowledge_version=told.version)).knowledge is None
    assert scheduler.routing_view(told.version).knowledge is None


def test_a_worker_that_loads_is_told_nothing_yet() -> None:
    scheduler = _scheduler(_Clock())
    scheduler.report_worker(worker_report())
    scheduler.turn()

    assert scheduler.report_worker(worker_report("w1", phase=StartupPhase.LOADING)).knowledge is None


def test_a_new_scheduler_uses_no_number_that_somebody_has() -> None:
    learner = _Learner()
    scheduler = _scheduler(_Clock(), learner)
    scheduler.turn()
    assert learner.asked == [], "nobody has said what model this is"

    scheduler.report_worker(worker_report(knowledge_version=7, clusters_version=3))
    scheduler.routing_view(9)
    scheduler.turn()

    assert learner.asked == [(10, TOP_K, 3)]


def test_learning_waits_its_time_and_keeps_what_is_known() -> None:
    clock, learner = _Clock(), _Learner()
    scheduler = _scheduler(clock, learner)
    scheduler.report_worker(worker_report())
    scheduler.turn()
    learner.has_news = False

    clock.now_s += 1
    scheduler.turn()
    assert len(learner.asked) == 1
    clock.now_s += 3
    scheduler.turn()

    assert [version for version, _, _ in learner.asked] == [1, 2]
    line = scheduler.status().knowledge
    assert line is not None
    assert (line.version, line.age_s, line.num_clusters) == (1, 4.0, 2)


def test_silent_processes_are_forgotten_and_others_age() -> None:
    clock = _Clock()
    scheduler = _scheduler(clock)
    scheduler.report_worker(worker_report("w0"))
    scheduler.report_host(host_report(0))
    clock.now_s += 8
    scheduler.report_worker(worker_report("w1"))
    clock.now_s += 4
    scheduler.turn()

    view, status = scheduler.routing_view(0), scheduler.status()

    assert [(report.worker_id, age_s) for report, age_s in view.workers] == [("w1", 4.0)]
    assert [worker.worker_id for worker in status.workers] == ["w1"]
    assert status.hosts == ()


def test_a_drained_node_gets_nothing_new_until_it_is_used_again() -> None:
    scheduler = _scheduler(_Clock())
    on_a, on_b = worker_report("w0", num_running=2), worker_report("w1", node_id="node-b")
    for report in (on_a, on_b):
        scheduler.report_worker(report)

    line = scheduler.drain("node-a")

    assert (line.is_empty, line.left) == (False, ("worker w0: 2 running, 0 waiting",))
    assert scheduler.report_worker(on_a).is_draining
    assert not scheduler.report_worker(on_b).is_draining
    assert [report.worker_id for report, _ in scheduler.routing_view(0).workers] == ["w1"]
    scheduler.report_worker(worker_report("w0"))
    assert [(drain.node_id, drain.is_empty) for drain in scheduler.status().drains] == [("node-a", True)]
    scheduler.undrain("node-a")
    assert not scheduler.report_worker(on_a).is_draining
    assert len(scheduler.routing_view(0).workers) == 2


class _Placed:
    """A placer whose hosts own what the test says; None: not known yet."""

    placement: Placement | None = None


def test_a_node_is_empty_only_when_its_hosts_have_nothing_to_answer() -> None:
    placed = _Placed()
    scheduler = _scheduler(_Clock())
    scheduler.report_host(host_report(0, epochs=(1, 2)))
    fixed = scheduler.drain("node-a")
    scheduler._placer = placed  # type: ignore[assignment]
    unknown = scheduler.drain("node-a")
    placed.placement = Placement(epoch=1, hosts={0: {0: (1, 2)}})
    owns = scheduler.drain("node-a")
    placed.placement = Placement(epoch=2, hosts={})
    asked = scheduler.drain("node-a")
    scheduler.report_host(host_report(0, epochs=(2,)))
    empty = scheduler.drain("node-a")

    assert fixed.left == ("expert host 0: its experts stay: scheduler.placement is fixed",)
    assert unknown.left == ("expert host 0: which experts it has is not known yet",)
    assert owns.left == ("expert host 0: 2 experts",)
    assert asked.left == ("expert host 0: workers have not all left it",)
    assert (empty.is_empty, empty.left) == (True, ())


def test_a_drain_outlives_the_scheduler() -> None:
    store = _Store()
    first = _scheduler(_Clock(), store=store)
    first.drain("node-a")
    first.turn()

    second = _scheduler(_Clock(), store=store)
    second.turn()
    assert second.draining == {"node-a"}
    second.undrain("node-a")
    second.turn()
    third = _scheduler(_Clock(), store=store)
    third.turn()

    assert third.draining == frozenset()


def test_what_somebody_said_while_the_store_was_away_wins() -> None:
    store = _Store()
    first = _scheduler(_Clock(), store=store)
    first.drain("node-a")
    first.turn()
    store.away = True
    second = _scheduler(_Clock(), store=store)
    second.drain("node-b")
    second.turn()

    assert second.status().degraded == ("statistics store: no route",)
    assert second.report_worker(worker_report(node_id="node-b")).is_draining
    store.away = False
    second.turn()

    assert second.status().degraded == ()
    third = _scheduler(_Clock(), store=store)
    third.turn()
    assert third.draining == {"node-b"}


def test_without_hosts_there_is_no_plan() -> None:
    with pytest.raises(NothingToChange, match="no expert hosts"):
        _scheduler(_Clock()).plan()


def test_a_report_with_numbers_that_are_none_has_them_as_not_measured() -> None:
    clock = _Clock()
    scheduler = _scheduler(clock)
    nan = float("nan")
    scheduler.report_worker(worker_report("w", step_s=nan, stall_s=float("inf"), miss_s={Tier.DISK: nan}))
    scheduler.report_host(host_report(0, expert_s=nan, busy_s=nan))

    ((report, _),) = scheduler.routing_view(0).workers
    assert (report.step_s, report.stall_s, report.miss_s) == (0.0, 0.0, {Tier.DISK: 0.0})


def test_finite_numbers_are_left_as_they_are() -> None:
    report = worker_report("w", step_s=0.5, miss_s={Tier.DISK: 0.25})
    assert with_finite_numbers(report) is report
    spoilt = replace(MEMORY, calibration=(replace(MEMORY.calibration[0], predicted=float("nan")),))
    assert with_finite_numbers(spoilt).calibration[0].predicted == 0.0
    assert with_finite_numbers(spoilt).stall_s == MEMORY.stall_s
