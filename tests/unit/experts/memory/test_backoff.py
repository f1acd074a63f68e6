"""Reads ahead that fail are tried more and more rarely, by expert and by file; whoever waits is not held back."""

from __future__ import annotations

import numpy as np
import pytest
from expert_builders import HeldLink, open_store, write_experts

from actors.experts.memory.backoff import FIRST_S, LONGEST_S, ReadBackoff
from cluster.errors import ExpertReadError

ERROR = ExpertReadError("shard 2 is gone")


class Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def held(backoff: ReadBackoff) -> list[int]:
    mask = backoff.held()
    return [] if mask is None else np.flatnonzero(mask).tolist()


def wait_s(backoff: ReadBackoff, clock: Clock, index: int) -> float:
    """How long an expert is held back from now on."""
    began_s = clock.now_s
    while index in held(backoff):
        clock.now_s += 0.01
    return clock.now_s - began_s


def test_waits_double_up_to_the_longest_and_start_anew_after_a_success():
    clock = Clock()
    backoff = ReadBackoff(["a", "b"], now_s=clock, seed=1)
    waits = []
    for _ in range(12):
        backoff.failed(0, ERROR)
        waits.append(wait_s(backoff, clock, 0))
    for attempt, waited_s in enumerate(waits):
        longest_s = min(LONGEST_S, FIRST_S * 2**attempt)
        assert longest_s / 2 - 0.02 <= waited_s <= longest_s + 0.02
    assert len({round(waited_s / min(LONGEST_S, FIRST_S * 2**i), 2) for i, waited_s in enumerate(waits)}) > 3, "drawn"
    backoff.succeeded(0)
    assert backoff.problem() is None
    backoff.failed(0, ERROR)
    assert wait_s(backoff, clock, 0) <= FIRST_S + 0.02


def test_file_that_fails_holds_all_its_experts_and_no_others():
    backoff = ReadBackoff(["a", "a", "b"], now_s=Clock())
    backoff.failed(0, ERROR)
    assert held(backoff) == [0, 1]
    assert backoff.waiting() == {0: ERROR}, "the other has not failed itself"
    backoff.succeeded(1)  # somebody waited for it, and it came
    assert held(backoff) == [0]


def test_failures_under_way_together_count_once():
    clock = Clock()
    backoff = ReadBackoff(["a"] * 8, now_s=clock)
    for index in range(8):
        backoff.failed(index, ERROR)
    assert max(wait_s(backoff, clock, index) for index in range(8)) <= FIRST_S + 0.02


def test_what_failed_shows_in_words():
    backoff = ReadBackoff(["a", "b"], now_s=Clock())
    backoff.failed(0, ERROR)
    backoff.failed(1, ExpertReadError("shard 3 is gone"))
    text = backoff.problem() or ""
    assert "reading 2 experts ahead of need failed, up to 1 times in a row" in text
    assert text.endswith("shard 3 is gone")


def test_forecasts_do_not_hammer_a_disk_that_fails(tmp_path):
    """Every step brings a new forecast; a step that needs the expert still tries, and its success ends the wait."""
    made: list[HeldLink] = []

    def broken(link: object) -> HeldLink:
        made.append(HeldLink(link))  # type: ignore[arg-type]
        made[-1].broken.update(range(8))
        return made[-1]

    store = open_store(write_experts(tmp_path), slots=4, wrap=broken)
    priority = np.zeros(store.grid.size, dtype=np.float32)
    priority[[1, 2]] = 1.0
    for _ in range(200):
        store.want(priority)
        assert store.wait_idle(10)
    assert len(made[0].loads) < 20
    assert any("ahead of need failed" in problem for problem in store.problems)
    with pytest.raises(ExpertReadError):
        list(store.acquire(0, [1]))
    assert made[0].loads[-1] == 1
    made[0].broken.clear()
    list(store.acquire(0, [1]))
    list(store.acquire(0, [2]))
    assert store.problems == ()
    store.close()
