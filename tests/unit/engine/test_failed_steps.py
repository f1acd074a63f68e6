"""Steps that fail one after the other show, everywhere somebody looks."""

from __future__ import annotations

from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest

from actors.attention.reporting import WorkerReporter
from actors.attention.status import worker_status
from actors.attention.worker import AttentionWorker
from actors.engine.engine import StepOutput
from actors.engine.failed_steps import FAILING_AFTER, FailedSteps
from cluster.config.load import load_config
from cluster.errors import InvalidRequest, MoesaicError, Unavailable
from cluster.model.info import load_model_info
from cluster.stats.memory_store import MemoryStore
from cluster.types import RequestId

BROKEN = MoesaicError("asked for only where it is")


@dataclass
class Clock:
    now_s: float = 0.0

    def __call__(self) -> float:
        return self.now_s


def failed(*, times: int, clock: Clock | None = None, error: MoesaicError = BROKEN) -> FailedSteps:
    steps = FailedSteps(clock=clock or Clock())
    for _ in range(times):
        steps.note(0, [error])
    return steps


def test_one_token_ends_the_row() -> None:
    steps = failed(times=FAILING_AFTER + 2)
    assert steps.is_failing and steps.in_a_row == FAILING_AFTER + 2
    assert steps.degraded == (f"{FAILING_AFTER + 2} steps in a row failed: {BROKEN.message}",)

    steps.note(0, [])  # part of a prompt: says nothing yet
    assert steps.is_failing
    steps.note(1, [BROKEN])
    assert (steps.is_failing, steps.in_a_row, steps.degraded, steps.total) == (False, 0, (), FAILING_AFTER + 2)


def test_requests_that_are_wrong_themselves_show_and_close_no_door() -> None:
    steps = failed(times=50, error=InvalidRequest("layer 3 is not finite"))

    assert steps.in_a_row == 50 and "layer 3" in steps.degraded[0]
    assert not steps.is_failing and not steps.is_given_up


def test_who_fails_for_long_is_given_up() -> None:
    clock = Clock()
    steps = failed(times=FAILING_AFTER, clock=clock)
    assert not steps.is_given_up

    clock.now_s = 31.0
    assert steps.is_given_up
    steps.note(1, [])
    assert not steps.is_given_up


class BrokenEngine:
    """Raises, or ends every sequence with an error, as told."""

    def __init__(self, *, raises: bool) -> None:
        self.raises = raises

    def step(self) -> list[StepOutput]:
        if self.raises:
            raise RuntimeError("asked for only where it is")
        return [StepOutput(RequestId("r"), -1, None, None, 0, error=BROKEN)]

    def abort_all(self) -> list[RequestId]:
        return []


@pytest.mark.parametrize("raises", [True, False])
def test_a_worker_whose_steps_all_fail_says_so_and_is_replaced(raises: bool) -> None:
    config = load_config()
    worker = AttentionWorker(config, load_model_info("moesaic-demo"), MemoryStore())
    worker.failed_steps = FailedSteps(clock=(clock := Clock()))
    exchange = WorkerReporter(worker, config, lambda _: None, replica_id="r", node_id="n")  # type: ignore[arg-type]
    parts: Any = SimpleNamespace(engine=BrokenEngine(raises=raises))
    for count in range(1, FAILING_AFTER + 1):
        worker._step(parts)
        status = worker_status(worker, config)
        assert status.failed_steps == count
        assert "asked for only where it is" in status.degraded[0], "the first one shows, too"

    assert status.is_failing
    exchange.check_progress()
    clock.now_s = 31.0
    with pytest.raises(Unavailable, match="asked for only where it is"):
        exchange.check_progress()
