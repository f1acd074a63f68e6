"""Status, plan and diagnosis of one moment have the same numbers, whatever is reported and learned in between."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scheduler_values import LAYERS, NUM_EXPERTS, host_report, knowledge, worker_report

from cluster.cli.scheduler_lines import scheduler_lines
from cluster.config.sections import SchedulerConfig
from cluster.control.placer import HostPlacer
from cluster.control.scheduler import Scheduler
from cluster.placement.explain import plan_as_dict, plan_headline
from cluster.placement.migration import MigrationPhase
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, DECODE, PREFILL, ExpertStatistics, no_statistics
from cluster.stats.memory_store import MemoryStore


@dataclass
class _Clock:
    now_s: float = 100.0

    def __call__(self) -> float:
        return self.now_s


class _Learner:
    """Reads other statistics at every turn; its knowledge is made from the first, which know one kind fewer."""

    def __init__(self, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        self.statistics: ExpertStatistics | None = None
        self.turns = 0

    def learn(self, version: int, *, top_k: int, seen_clusters: int) -> Knowledge | None:
        self.turns += 1
        num_kinds = 2 if self.turns == 1 else 3
        self.statistics = no_statistics(self.turns, num_kinds, LAYERS, NUM_EXPERTS)
        for phase in (PREFILL, DECODE):
            shape = self.statistics.values[:, phase, :, :, COUNT].shape
            self.statistics.values[:, phase, :, :, COUNT] = self.random.gamma(0.3, size=shape) * 1e5
        return knowledge(version) if self.turns == 1 else None


class _Runner:
    def __init__(self, placement: Any) -> None:
        self.placement = placement

    def begin(self) -> None: ...

    def start(self, target: Any, *, capacities: Any, expert_bytes: int) -> bool:
        return False

    def status(self) -> Any:
        idle = {"phase": MigrationPhase.IDLE, "reason": "", "stages_left": 0, "planned_bytes": 0, "moved_bytes": 0}
        return SimpleNamespace(**idle)

    def close(self) -> None: ...


def _case(seed: int) -> tuple[Scheduler, _Clock]:
    clock, learner, store = _Clock(), _Learner(seed), MemoryStore()
    config = SchedulerConfig()
    placer = HostPlacer(
        config,
        fingerprint="f",
        store=store,
        num_hosts=2,
        statistics=lambda: learner.statistics,
        make_runner=lambda placement, *_: _Runner(placement),
    )
    scheduler = Scheduler(config, fingerprint="f", store=store, learner=learner, placer=placer, clock=clock)
    _report(scheduler, learner.random)
    scheduler.turn()
    clock.now_s += 4.0
    scheduler.turn()
    return scheduler, clock


def _report(scheduler: Scheduler, random: np.random.Generator) -> None:
    scheduler.report_worker(worker_report(num_running=int(random.integers(1, 9))))
    for index in range(2):
        speed = {"expert_s": float(random.uniform(1e-4, 1e-2)), "row_s": float(random.uniform(1e-5, 1e-3))}
        scheduler.report_host(host_report(index, node_id=f"n{index}", num_rows=100, num_batches=10, **speed))


@pytest.mark.parametrize("seed", range(8))
def test_pages_of_one_moment_agree(seed: int) -> None:
    scheduler, clock = _case(seed)
    random = np.random.default_rng(seed + 1000)
    status = scheduler.status()
    _report(scheduler, random)  # what is reported meanwhile is of the next moment
    clock.now_s += 0.5
    plan = scheduler.plan()
    _report(scheduler, random)
    diagnosis = scheduler.diagnose()

    assert status.snapshot == plan.snapshot == diagnosis.snapshot is not None
    assert status.placement.balance == pytest.approx(plan.balance_now) == diagnosis.balance_now
    assert plan.balance_now >= 1.0
    assert status.knowledge is not None and diagnosis.semantic is not None
    assert status.knowledge.num_clusters == diagnosis.semantic.num_kinds == 2
    assert status.knowledge.mutual_information == diagnosis.semantic.mutual_information
    assert sum(host.owned or 0 for host in status.hosts) == len(LAYERS) * NUM_EXPERTS
    assert len(status.hosts) == diagnosis.num_hosts and len(status.workers) == diagnosis.semantic.num_workers

    clock.now_s += 5.0
    later = scheduler.plan()
    assert later.snapshot is not None and plan.snapshot is not None
    assert later.snapshot.number == plan.snapshot.number + 1


def test_what_changes_the_answer_makes_a_new_moment_at_once() -> None:
    scheduler, _ = _case(0)
    before = scheduler.status().snapshot
    scheduler.drain("n1")
    after = scheduler.status().snapshot

    assert before is not None and after is not None and after.number == before.number + 1
    assert scheduler.plan().snapshot == after


def test_pages_print_which_moment_they_are_of() -> None:
    scheduler, clock = _case(0)
    clock.now_s += 12.0
    status, plan = scheduler.status(), plan_as_dict(scheduler.plan())
    page = {
        "uptime_s": 1.0,
        "routing": "semantic",
        "placement_mode": "auto",
        "workers": [1],
        "hosts": [1],
        "knowledge": None,
        "drains": [],
        "degraded": [],
        "snapshot": plan["snapshot"],
        "placement": {name: getattr(status.placement, name) for name in status.placement.__slots__},
    }
    line = f"snapshot {plan['snapshot']['number']}: scheduler up 16.0 s, placement epoch 1"

    assert line in plan_headline(plan)
    assert f"  {line}" in scheduler_lines(page)
    assert status.placement.plan_age_s == pytest.approx(16.0)
    assert any("(16 s ago)" in text for text in scheduler_lines(page))
