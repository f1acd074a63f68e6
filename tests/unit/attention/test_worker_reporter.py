"""How a worker follows the scheduler, and when it is given up as standing still."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
from scheduler_values import knowledge

from actors.attention.reporting import WorkerReporter
from actors.engine.failed_steps import FailedSteps
from cluster.config.load import MoesaicConfig
from cluster.errors import Unavailable
from cluster.status.reports import WorkerDirectives, WorkerReport
from cluster.token_stream.progress import Progress
from cluster.types import StartupPhase


class _Worker(SimpleNamespace):
    """A worker that still loads: nothing of an engine is there."""

    def __init__(self) -> None:
        super().__init__(worker_id="w0", phase=StartupPhase.LOADING, parts=None, is_draining=False, known=[])
        self.stalled_s = 0.0
        self.failed_steps = FailedSteps()

    def set_knowledge(self, value: object) -> None:
        self.known.append(value)

    def progress(self) -> Progress:
        return Progress(stalled_s=self.stalled_s)


class _Scheduler:
    def __init__(self, *answers: WorkerDirectives) -> None:
        self.answers = list(answers)
        self.reports: list[WorkerReport] = []

    def report(self, report: WorkerReport) -> WorkerDirectives:
        self.reports.append(report)
        return self.answers.pop(0)


def _exchange(worker: _Worker, scheduler: _Scheduler) -> WorkerReporter:
    any_worker: Any = worker
    return WorkerReporter(any_worker, MoesaicConfig(), scheduler.report, replica_id="r0", node_id="n0")


def test_knowledge_and_draining_are_followed_and_told_back() -> None:
    news = knowledge(version=7)
    worker, scheduler = _Worker(), _Scheduler(WorkerDirectives(knowledge=news, is_draining=True), WorkerDirectives())
    exchange = _exchange(worker, scheduler)

    exchange.tell()
    assert worker.known == [news]
    assert worker.is_draining
    exchange.tell()

    assert worker.known == [news]
    assert not worker.is_draining
    first = scheduler.reports[0]
    assert (first.worker_id, first.replica_id, first.node_id, first.phase) == ("w0", "r0", "n0", StartupPhase.LOADING)


def test_a_worker_that_may_wait_for_an_expert_is_not_given_up() -> None:
    worker = _Worker()
    exchange = _exchange(worker, _Scheduler())
    experts = MoesaicConfig().experts
    longest_s = max(experts.load_timeout_s, experts.host_timeout_s)

    worker.stalled_s = longest_s + 1.5
    exchange.check_progress()
    worker.stalled_s = longest_s + 2.5

    with pytest.raises(Unavailable, match="moved nothing"):
        exchange.check_progress()
