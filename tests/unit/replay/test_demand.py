"""Replay without prefetch: what is missed at every cache size, and the time that it takes."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from replay_runs import policies_of, run_trace, steps_of
from trace_builders import clustered_trace, trace_of

from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.signals import Grid
from cluster.replay.demand import DemandRun, replay_demand
from cluster.replay.schedule import ReplayStep, grid_of

EXPERTS, TOP_K = 6, 2


choices = st.lists(
    st.lists(st.permutations(range(EXPERTS)).map(lambda p: p[:TOP_K]), min_size=2, max_size=2), min_size=1, max_size=12
)


CACHING = ("lru", "lru-per-layer", "lfu", "static", "mrs", "eam", "fmoe")


def _demand(grid: Grid, policy: str, slots: Sequence[int], steps: Sequence[ReplayStep]) -> list[DemandRun]:
    meter = CostMeter(load_s=1e-3, layer_s=3e-4)
    return replay_demand(grid, policies_of(policy, grid, steps, max(slots), meter), slots, steps)


@settings(max_examples=20, deadline=None)
@given(requests=st.lists(choices, min_size=1, max_size=2), concurrency=st.integers(1, 2))
def test_belady_misses_least_at_every_cache_size(requests: list[list[list[list[int]]]], concurrency: int) -> None:
    trace = trace_of(requests, num_experts=EXPERTS)
    grid, steps = grid_of(trace), steps_of(trace, concurrency)
    sizes = range(min(TOP_K * concurrency, EXPERTS), grid.size + 1, 2)

    def missed(policy: str) -> list[int]:
        return [int(run.num_missing.sum()) for run in _demand(grid, policy, sizes, steps)]

    best = missed("belady")

    assert best == sorted(best, reverse=True)
    for policy in CACHING:
        assert all(least <= other for least, other in zip(best, missed(policy), strict=True)), policy


@settings(max_examples=25, deadline=None)
@given(rows=choices, slots=st.integers(TOP_K, 12))
def test_lru_hits_equal_a_brute_force_cache(rows: list[list[list[int]]], slots: int) -> None:
    trace = trace_of([rows], num_experts=EXPERTS)
    (run,) = _demand(grid_of(trace), "lru", [slots], steps_of(trace))

    cache: OrderedDict[tuple[int, int], None] = OrderedDict()
    hits = 0
    for row in rows:
        for layer, experts in enumerate(row):
            wanted = [(layer, e) for e in sorted(experts)]
            present = [key for key in wanted if key in cache]
            hits += len(present)
            for key in present:
                cache.move_to_end(key)
            for key in wanted:
                if key in present:
                    continue
                if len(cache) == slots:
                    del cache[next(old for old in cache if old not in wanted)]
                cache[key] = None
    assert run.num_timely.sum() == hits


@settings(max_examples=25, deadline=None)
@given(rows=choices, share=st.integers(TOP_K, EXPERTS))
def test_lru_per_layer_is_a_cache_of_its_own_for_every_layer(rows: list[list[list[int]]], share: int) -> None:
    trace = trace_of([rows], num_experts=EXPERTS)
    steps = steps_of(trace)
    (run,) = _demand(grid_of(trace), "lru-per-layer", [2 * share], steps)

    # while the memory fills, layers may differ; what exceeds it goes from the layer that holds most
    last_use: list[dict[int, int]] = [{}, {}]
    for event, experts in enumerate(layer for row in rows for layer in row):
        own = last_use[event % 2]
        assert run.num_timely[event] == len(own.keys() & set(experts))
        own |= {e: EXPERTS * event + e for e in experts}
        while sum(map(len, last_use)) > 2 * share:
            fullest = max(last_use, key=lambda of_layer: (len(of_layer), -min(of_layer.values())))
            del fullest[min(fullest, key=lambda e: fullest[e])]


@pytest.mark.parametrize("policy", ["lru", "mrs", "eam"])
@pytest.mark.parametrize(("slots", "concurrency"), [(24, 1), (30, 3), (3, 2)])
def test_caching_alone_takes_the_time_that_the_simulator_says(policy: str, slots: int, concurrency: int) -> None:
    trace = clustered_trace(num_requests=4, num_rows=5, seed=8)
    grid, steps = grid_of(trace), steps_of(trace, concurrency)
    (run,) = _demand(grid, policy, [slots], steps)

    for rate in (2e6, 3e7):
        simulated = run_trace(
            trace,
            policy,
            slots=slots,
            rate=rate,
            concurrency=concurrency,
            sequence_s=3e-4,
            wake_s=2e-4,
            contention=0.3,
        )
        closed = run.timed(simulated.machine)
        assert closed.token_s == pytest.approx(simulated.outcome.token_s)
        assert closed.decode.stall_s == pytest.approx(simulated.outcome.decode.stall_s)
        for name in ("demand_chunks", "decode_chunks", "num_tokens", "num_resident"):
            assert getattr(closed, name) == getattr(simulated.outcome, name)
        assert (closed.decode.timely, closed.decode.missed) == (
            simulated.outcome.decode.timely,
            simulated.outcome.decode.missed,
        )
