"""When an engine counts as standing still."""

from __future__ import annotations

from cluster.token_stream.progress import ProgressMeter


class Clock:
    now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def test_time_without_progress_counts_only_while_there_is_work() -> None:
    clock = Clock()
    meter = ProgressMeter(first_step_s=30, clock=clock)

    clock.now_s += 60
    assert meter.look((1, 0), step_s=0.01, has_work=False).stalled_s == 0
    clock.now_s += 3
    assert meter.look((1, 0), step_s=0.01, has_work=True).stalled_s == 3
    assert meter.look((1, 1), step_s=0.01, has_work=True).stalled_s == 0, "a layer more, within a long step"


def test_slow_steps_are_given_twenty_of_them() -> None:
    meter = ProgressMeter(first_step_s=30, clock=Clock())

    assert meter.look((), step_s=0.01, has_work=True).allowed_s == 2
    slow = meter.look((), step_s=0.5, has_work=True)
    assert (slow.allowed_s, slow.silence_s) == (10, 10)


def test_the_first_step_and_waits_with_deadlines_of_their_own_are_legal() -> None:
    meter = ProgressMeter(first_step_s=30, wait_s=5, clock=Clock())

    first = meter.look((), step_s=0, has_work=True)
    assert (first.allowed_s, first.silence_s) == (35, 2), "whoever waits can still say so"
    assert meter.look((), step_s=0.01, has_work=True).allowed_s == 7
