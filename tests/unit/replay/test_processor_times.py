"""What a step of the replay takes: each knob of its processor is seen in the times."""

from __future__ import annotations

import numpy as np
import pytest
from replay_runs import run_trace
from trace_builders import clustered_trace, trace_of


def test_forecasts_cost_time_only_where_compute_waits_for_them() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    def total_s(policy: str, **machine: float) -> float:
        return run_trace(trace, policy, slots=24, rate=3e7, **machine).outcome.total_s

    free, late = total_s("lru+next-gate"), total_s("lru+next-gate", predict_s=2e-4)
    waited_for = total_s("lru+next-gate", predict_s=2e-4, predict_on_path=True)

    assert free < late < waited_for <= free + 32 * 6 * 2e-4 + 1e-9
    assert total_s("lru", predict_s=2e-4, predict_on_path=True) == total_s("lru")


def test_time_of_a_step_is_compute_and_what_is_waited_for() -> None:
    trace = trace_of([[[[0, 1]], [[0, 2]]]], num_experts=4)

    run = run_trace(trace, "lru", slots=2, rate=3e6)  # an expert takes 1 ms

    first = 1e-4 + 1e-3 + 1e-3 + 1e-4  # the second arrives while the first computes
    second = 1e-4 + 1e-3 + 1e-4  # expert 0 is resident and computes meanwhile
    assert run.outcome.token_s == pytest.approx([first, second])
    assert run.outcome.decode.stall_s == pytest.approx(1e-3 + 9e-4 + 9e-4)


def test_attention_takes_longer_with_every_sequence() -> None:
    trace = trace_of([[[[0, 1]], [[0, 1]]], [[[0, 1]], [[0, 1]]]], num_experts=4)

    run = run_trace(trace, "lru", slots=2, rate=3e6, concurrency=2, base_s=1e-3, sequence_s=5e-4)

    assert run.outcome.token_s[-1] == pytest.approx(1e-3 + 5e-4 + 2e-4)


def test_layers_take_different_times_but_the_same_on_average_and_in_every_replay() -> None:
    trace = trace_of([[[[0, 1]]] * 500], num_experts=4)
    runs = [run_trace(trace, "lru", slots=4, base_s=1e-3, spread=spread).outcome for spread in (0.0, 0.3, 0.3)]
    alike, *varied = (np.array(run.token_s[1:]) for run in runs)

    assert alike == pytest.approx(1.2e-3)
    assert np.log(varied[0]).std() == pytest.approx(0.3, rel=0.2)
    assert varied[0].mean() == pytest.approx(1.2e-3, rel=0.1)
    assert (varied[0] == varied[1]).all()


def test_what_fits_beside_a_layer_does_not_jump_with_its_length() -> None:
    """Chunks and layers of always the same length beat against each other."""
    trace = clustered_trace(num_requests=6, num_rows=40, seed=1)

    def largest_jump(spread: float) -> float:
        lengths_s = np.arange(5e-4, 1.5e-3, 5e-5)
        runs = [run_trace(trace, "lru+next-gate", slots=24, rate=3e6, base_s=s, spread=spread) for s in lengths_s]
        hits = [(counts.late + counts.timely) / counts.uses for counts in (run.outcome.decode for run in runs)]
        return float(np.abs(np.diff(hits)).max())

    assert largest_jump(0.3) < 0.5 * largest_jump(0.0)


def test_computing_takes_longer_beside_a_busy_link() -> None:
    trace = trace_of([[[[0, 1]], [[0, 1]]]], num_experts=4)

    run = run_trace(trace, "lru", slots=2, rate=3e6, expert_s=2e-3, contention=0.5)  # an expert arrives every ms

    beside = 1e-3 + (2e-3 - 1e-3 / 1.5)  # a millisecond of the first expert, then the link is idle
    assert run.outcome.token_s == pytest.approx([1e-4 + 1e-3 + beside + 2e-3, 1e-4 + 2 * 2e-3])


def test_what_is_fetched_ahead_slows_computing_down() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    alone, beside = (
        [run_trace(trace, "lru+next-gate", slots=slots, rate=3e7, contention=share).outcome for slots in (24, 48)]
        for share in (0.0, 0.3)
    )

    assert beside[0].total_s > 1.02 * alone[0].total_s
    assert beside[1].token_s[-7:] == pytest.approx(alone[1].token_s[-7:]), "with everything resident nothing is loaded"


def test_search_takes_time_from_computing_not_from_waiting() -> None:
    rows = [[[0, 1], [2, 3]]] * 12
    resident = run_trace(trace_of([rows], num_experts=4), "lru+next-gate", slots=8, predict_s=2e-4, search_s=1e-4)

    step_s = 1e-4 + 2 * (1e-4 + 2e-4 + 1e-4)  # one search as the step begins, one after every gate
    assert resident.outcome.token_s[-1] == pytest.approx(step_s)

    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)
    free, costly = (
        run_trace(trace, "lru+next-gate", slots=12, rate=2e6, predict_s=2e-4, search_s=search_s).outcome
        for search_s in (0.0, 1e-4)
    )
    num_searches = len(costly.token_s) * 7
    assert costly.total_s - free.total_s < 0.7 * num_searches * 1e-4


def test_forecast_of_a_gate_that_is_long_past_still_counts_from_when_it_is_there() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    def begun_in_time(predict_s: float, predict_spread: float = 0.0) -> int:
        run = run_trace(trace, "lru+next-gate", slots=24, rate=3e7, predict_s=predict_s, predict_spread=predict_spread)
        return run.outcome.decode.timely + run.outcome.decode.late

    prompt, late, never = (begun_in_time(predict_s=predict_s) for predict_s in (1e-5, 5e-4, 1.0))
    assert prompt > late >= never
    assert late < begun_in_time(predict_s=5e-4, predict_spread=1.0) < prompt, "some of them come in time"


def test_chunk_ahead_begins_after_its_thread_woke() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    sent = [
        run_trace(trace, "lru+next-gate", slots=24, rate=3e7, lag_s=lag_s).outcome.prefetch_chunks
        for lag_s in (0.0, 1e-4, 1e-3)
    ]

    assert sent[0] > sent[1] > sent[2]
