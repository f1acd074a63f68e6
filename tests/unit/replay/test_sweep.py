"""Many policies on many machines: what shares a pass ends as it would alone; the past teaches and is not changed."""

from __future__ import annotations

from dataclasses import replace

import pytest
from trace_builders import clustered_trace

from cluster.errors import InvalidRequest
from cluster.policies.trace import GateTrace
from cluster.replay.result import ReplayCell, with_bounds
from cluster.replay.sweep import Past, Sweep, learn_past, replay_cells

POLICIES = ("lru", "mrs", "fmoe", "moesaic", "belady", "lru-per-layer+next-gate", "eam+eam", "moesaic+moesaic")
SWEEP = Sweep(policies=POLICIES, caches=(0.25, 0.5), links=(0.003, 0.03), concurrencies=(1, 2))


@pytest.fixture(scope="module")
def trace() -> GateTrace:
    return clustered_trace(num_requests=3, num_rows=6, seed=21)


@pytest.fixture(scope="module")
def past() -> Past:
    return learn_past(clustered_trace(num_requests=3, num_rows=10, seed=20), SWEEP)


def _cells(trace: GateTrace, past: Past | None, sweep: Sweep) -> list[ReplayCell]:
    return list(replay_cells(trace, past, sweep))


def test_machines_of_one_pass_end_as_alone(trace: GateTrace, past: Past) -> None:
    together = _cells(trace, past, SWEEP)

    assert len(together) == SWEEP.num_cells
    for cell in together[::3]:  # a step that meets every policy, cache and link
        (alone,) = _cells(
            trace,
            past,
            replace(
                SWEEP,
                policies=(cell.policy,),
                caches=(cell.cache,),
                links=(cell.link_gb_per_s,),
                concurrencies=(cell.concurrency,),
            ),
        )
        assert alone == cell


def test_without_prefetch_only_times_depend_on_the_link(trace: GateTrace) -> None:
    slow, fast = _cells(trace, None, replace(SWEEP, policies=("mrs",), caches=(0.25,), concurrencies=(1,)))

    assert (slow.timely_hit_rate, slow.num_loads) == (fast.timely_hit_rate, fast.num_loads)
    assert slow.tpot_ms_mean > 2 * fast.tpot_ms_mean


def test_bounds_are_those_of_the_same_machine(trace: GateTrace) -> None:
    sweep = replace(SWEEP, policies=("lru", "belady", "belady+oracle"), concurrencies=(1,))

    cells = with_bounds(_cells(trace, None, sweep))

    best = {(c.cache, c.link_gb_per_s): c for c in cells if c.policy == "belady+oracle"}
    for cell in cells:
        assert cell.gap_to_belady is not None and cell.slowdown_to_oracle is not None
        assert cell.tpot_ms_mean / best[cell.cache, cell.link_gb_per_s].tpot_ms_mean == cell.slowdown_to_oracle
        assert cell.policy != "lru" or cell.gap_to_belady >= 0
    assert max(cell.gap_to_belady or 0 for cell in cells) > 0


def test_only_what_the_policies_need_is_learned() -> None:
    trace = clustered_trace(num_requests=1, num_rows=4, seed=22)

    past = learn_past(trace, replace(SWEEP, policies=("static", "eam+eam")))

    assert past.activations is not None and past.map_store is None and past.next_use is None
    assert past.frequency.sum() == 4 * len(trace.model.layers) * trace.model.top_k


@pytest.mark.parametrize("cache", [0.001, 1.5])
def test_cache_that_holds_no_token_or_more_than_all_is_refused(trace: GateTrace, cache: float) -> None:
    with pytest.raises(InvalidRequest, match="one token's"):
        _cells(trace, None, replace(SWEEP, caches=(0.5, cache)))


def test_trace_without_requests_gives_zeros(trace: GateTrace) -> None:
    cells = _cells(trace.select([]), None, replace(SWEEP, policies=("lru", "lru-per-layer+next-gate")))

    assert all(cell.num_loads == 0 and cell.tpot_ms_mean == 0 for cell in cells)
