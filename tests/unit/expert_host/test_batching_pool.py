"""The pool: what runs together, in which order, and what is refused instead."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from actors.data_plane.frames import Answer, DispatchFrame, RefusalFrame, RefusalReason
from actors.data_plane.task import DispatchTask
from actors.expert_host.batching_pool import BatchingPool

EPOCH = 1


class _Clock:
    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


def _task(
    sequence: int,
    answers: dict[int, Answer] | None = None,
    *,
    layer: int = 0,
    num_rows: int = 1,
    top_k: int = 2,
    dtype: type = np.float32,
    epoch: int = EPOCH,
    deadline_us: int = 10_000_000,
    arrived_s: float = 100.0,
) -> DispatchTask:
    frame = DispatchFrame(
        sequence=sequence,
        epoch=epoch,
        step=0,
        layer=layer,
        micro_batch=0,
        deadline_us=deadline_us,
        rows=np.zeros((num_rows, 4), dtype),
        expert_ids=np.zeros((num_rows, top_k), np.int64),
        weights=np.zeros((num_rows, top_k), np.float32),
    )

    def reply(answer: Answer) -> None:
        if answers is not None:
            assert sequence not in answers, "one answer to a frame"
            answers[sequence] = answer

    return DispatchTask(frame, reply, arrived_s)


def _pool(max_rows: int = 8, clock: _Clock | None = None) -> BatchingPool:
    return BatchingPool(max_rows=max_rows, clock=clock or _Clock())


def _taken(pool: BatchingPool) -> list[int]:
    return [task.frame.sequence for task in pool.take()]


def test_frames_of_one_layer_that_wait_run_together() -> None:
    pool = _pool()
    for sequence, layer in enumerate((5, 6, 5, 5, 6)):
        pool.add(_task(sequence, layer=layer))

    assert [_taken(pool), _taken(pool), _taken(pool)] == [[0, 2, 3], [1, 4], []]
    assert len(pool) == 0


@pytest.mark.parametrize("other", [{"layer": 1}, {"dtype": np.uint16}, {"top_k": 3}])
def test_frames_that_one_kernel_call_cannot_take_run_apart(other: dict[str, Any]) -> None:
    pool = _pool()
    pool.add(_task(0))
    pool.add(_task(1, **other))
    pool.add(_task(2))

    assert [_taken(pool), _taken(pool)] == [[0, 2], [1]]


def test_batch_has_at_most_max_rows_unless_one_frame_alone_has_more() -> None:
    pool = _pool(max_rows=8)
    for sequence, num_rows in enumerate((5, 4, 3, 1, 20, 8)):
        pool.add(_task(sequence, num_rows=num_rows))

    assert [_taken(pool) for _ in range(5)] == [[0, 2], [1, 3], [4], [5], []]


def test_frame_of_another_plan_is_refused_with_the_plan_of_the_host() -> None:
    pool, answers = _pool(), dict[int, Answer]()
    pool.add(_task(0, answers))
    pool.add(_task(1, answers))
    pool.set_epochs(2, (2,))
    pool.add(_task(2, answers, epoch=2))

    assert _taken(pool) == [2]
    assert pool.num_refused == 2
    for sequence in (0, 1):
        answer = answers[sequence]
        assert isinstance(answer, RefusalFrame)
        assert (answer.sequence, answer.reason, answer.epoch) == (sequence, RefusalReason.STALE_EPOCH, 2)
        assert "epoch 1" in answer.message


def test_frame_that_came_too_long_ago_is_refused_and_one_in_time_is_not() -> None:
    clock, answers = _Clock(), dict[int, Answer]()
    pool = _pool(clock=clock)
    pool.add(_task(0, answers, deadline_us=1_000_000, arrived_s=100.0))
    pool.add(_task(1, answers, deadline_us=1_000_000, arrived_s=100.6))
    clock.now_s = 101.5

    assert _taken(pool) == [1]
    late = answers[0]
    assert isinstance(late, RefusalFrame)
    assert (late.reason, late.epoch) == (RefusalReason.LATE, EPOCH)
    assert "1000000 us" in late.message


def test_late_frames_take_no_place_in_a_batch() -> None:
    clock, answers = _Clock(), dict[int, Answer]()
    pool = _pool(max_rows=2, clock=clock)
    pool.add(_task(0, arrived_s=102.0))
    pool.add(_task(1, answers, deadline_us=1, arrived_s=100.0))
    pool.add(_task(2, arrived_s=102.0))
    clock.now_s = 102.0

    assert _taken(pool) == [0, 2]
    assert list(answers) == [1]


def test_nothing_but_refusals_gives_an_empty_batch() -> None:
    pool, answers = _pool(), dict[int, Answer]()
    for sequence in range(3):
        pool.add(_task(sequence, answers, epoch=9))

    assert pool.take() == []
    assert sorted(answers) == [0, 1, 2]


def test_what_waits_when_the_host_stops_is_handed_back() -> None:
    pool = _pool()
    tasks = [_task(0), _task(1, layer=1)]
    for task in tasks:
        pool.add(task)

    assert pool.drain() == tasks
    assert pool.take() == []


def test_busy_layer_does_not_keep_another_waiting() -> None:
    """As many frames of layer 0 as fit a batch come after every batch; the one of layer 1 is the second batch."""
    pool = _pool(max_rows=4)
    for sequence in range(8):
        pool.add(_task(sequence))
    pool.add(_task(100, layer=1))
    rounds: list[list[int]] = []
    for _ in range(4):
        rounds.append(_taken(pool))
        for _ in range(4):
            pool.add(_task(1000))

    assert [100] in rounds
    assert rounds.index([100]) <= 2


@settings(max_examples=60, deadline=None)
@given(
    frames=st.lists(
        st.tuples(st.integers(0, 2), st.integers(1, 9), st.integers(1, 2), st.sampled_from([EPOCH, 2])), max_size=25
    ),
    late=st.sets(st.integers(0, 24)),
)
def test_every_frame_is_taken_or_refused_once_and_oldest_first(
    frames: list[tuple[int, int, int, int]], late: set[int]
) -> None:
    pool, answers = _pool(), dict[int, Answer]()
    for sequence, (layer, num_rows, top_k, epoch) in enumerate(frames):
        deadline_us = 0 if sequence in late else 10_000_000
        pool.add(
            _task(
                sequence,
                answers,
                layer=layer,
                num_rows=num_rows,
                top_k=top_k,
                epoch=epoch,
                deadline_us=deadline_us,
                arrived_s=99.0,
            )
        )
    taken: list[int] = []
    waiting = [i for i, frame in enumerate(frames) if frame[3] == EPOCH and i not in late]
    while batch := pool.take():
        sequences = [task.frame.sequence for task in batch]
        assert sequences[0] == waiting[0], "the oldest is in the next batch"
        assert sequences == sorted(sequences)
        assert len({(frames[i][0], frames[i][2]) for i in sequences}) == 1
        assert len(batch) == 1 or sum(frames[i][1] for i in sequences) <= 8
        waiting = [i for i in waiting if i not in sequences]
        taken += sequences
    assert sorted([*taken, *answers]) == list(range(len(frames)))
    assert pool.num_refused == len(answers)
