"""One loop for all: its pace, how it is asked for a turn and stopped, and what becomes of turns that fail."""

from __future__ import annotations

import ast
import asyncio
import logging
import re
import threading
from pathlib import Path

import pytest

from cluster.errors import Unavailable
from cluster.periodic import Pace, PeriodicLoop, PeriodicTask

ROOT = Path(__file__).parents[2]
DEADLINE_S = 10.0


def _pace(interval_s: float | None = 3600.0) -> Pace:
    return Pace("test", interval_s=interval_s, expected=(Unavailable,), event="it is away")


def test_a_turn_says_when_the_next_is_due_or_the_interval_does() -> None:
    answers = iter((None, 0.5, None))
    loop = PeriodicLoop(lambda: next(answers), _pace(2.0))
    assert [loop.turn() for _ in range(3)] == [2.0, 0.5, 2.0]
    assert PeriodicLoop(lambda: None, _pace(None)).turn() is None, "no pace of its own: until it is asked for"


def test_what_was_expected_keeps_the_pace_and_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    pace = _pace(2.0)
    waits = [pace.failed(Unavailable("no answer")) for _ in range(3)]
    assert (waits, pace.problem, pace.num_failed) == ([2.0] * 3, "no answer", 3)
    assert caplog.text.count("it is away") == 1

    pace.succeeded()
    assert (pace.problem, pace.num_failed, pace.num_turns) == (None, 0, 4)
    pace.failed(Unavailable("again"))
    assert caplog.text.count("it is away") == 2


def test_a_defect_backs_off_and_does_not_fill_the_log(caplog: pytest.LogCaptureFixture) -> None:
    pace = _pace(2.0)
    waits = [pace.failed(RuntimeError("a defect")) for _ in range(1000)]
    assert waits[:5] == [2.0, 4.0, 8.0, 16.0, 16.0] and waits[-1] == 16.0
    errors = [record for record in caplog.records if record.levelno == logging.ERROR]
    assert len(errors) == 10, "the 1st, 2nd, 4th ... 512th"
    assert all(record.exc_info for record in errors)
    assert "a defect" in str(pace.problem)
    assert pace.succeeded() == 2.0
    assert pace.failed(RuntimeError("a defect")) == 2.0, "it begins anew"


def test_silence_is_since_the_last_turn_that_succeeded() -> None:
    now_s, failures = [10.0], list[Exception]()

    def turn() -> None:
        if failures:
            raise failures[0]

    loop = PeriodicLoop(turn, _pace(), clock=lambda: now_s[0])
    loop.turn()
    failures.append(Unavailable("away"))
    now_s[0] = 17.0
    loop.turn()
    assert loop.silent_s == 7.0
    failures.clear()
    loop.turn()
    assert loop.silent_s == 0.0


def test_dear_turns_come_less_often() -> None:
    loop = PeriodicLoop(lambda: sum(range(200_000)) * 0.0, _pace(0.001), max_cpu_share=0.01)
    pause_s = loop.turn()
    assert pause_s == pytest.approx(loop.cpu_s / 0.01) and pause_s > 0.001


def test_it_is_made_soon_when_asked_also_from_within_a_turn() -> None:
    made, asked = threading.Semaphore(0), [False]

    def turn() -> None:
        if not asked[0]:
            asked[0] = True
            loop.soon()
        made.release()

    loop = PeriodicLoop(turn, _pace())
    loop.start()
    assert all(made.acquire(timeout=DEADLINE_S) for _ in range(2)), "asked for while one was under way: another follows"
    loop.soon()
    assert made.acquire(timeout=DEADLINE_S)
    assert loop.stop(DEADLINE_S)
    assert not made.acquire(timeout=0)


def test_the_first_turn_waits_where_it_is_to() -> None:
    made = threading.Semaphore(0)
    loop = PeriodicLoop(made.release, _pace(), first_s=None, ends_with_turn=True)
    loop.start()
    assert not made.acquire(timeout=0)
    assert loop.stop(DEADLINE_S)
    assert loop.pace.num_turns == 1, "for what is left"


def test_a_stop_waits_no_longer_than_it_is_told_and_ends_a_loop_from_within() -> None:
    free, began = threading.Event(), threading.Event()

    def turn() -> None:
        began.set()
        assert free.wait(DEADLINE_S)
        assert not loop.stop(DEADLINE_S), "a turn does not wait for itself"

    loop = PeriodicLoop(turn, _pace())
    loop.start()
    assert began.wait(DEADLINE_S)
    assert not loop.stop(0.01)
    free.set()
    assert loop.stop(DEADLINE_S)
    assert loop.pace.problem is None


def test_a_task_goes_on_after_failures_and_can_start_again() -> None:
    asyncio.run(_run_a_task_twice())


async def _run_a_task_twice() -> None:
    made = asyncio.Event()
    answers: list[Exception] = [RuntimeError("a defect"), Unavailable("away")]

    async def turn() -> float:
        if answers:
            raise answers.pop()
        made.set()
        return 3600.0

    task = PeriodicTask(turn, _pace(0.001))
    for _ in range(2):
        task.start()
        task.start()
        await asyncio.wait_for(made.wait(), DEADLINE_S)
        made.clear()
        await task.close()
    await task.close()
    assert not made.is_set()


def test_nobody_else_writes_a_loop_of_a_pace_by_hand() -> None:
    """A `while` that waits for an event of the object's own is this loop once more."""
    by_hand: set[str] = set()
    for path in sorted((*ROOT.glob("cluster/**/*.py"), *ROOT.glob("actors/**/*.py"))):
        loops = (node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.While))
        if any(re.search(r"self\._(wake|stop|stopped)\.wait\(", ast.unparse(loop)) for loop in loops):
            by_hand.add(str(path.relative_to(ROOT)))
    process_that_is_restarted = "actors/ray_shells/valkey_actor.py"
    assert by_hand - {"cluster/periodic.py", "actors/experts/memory/shelves.py", process_that_is_restarted} == set()
