"""The replay's memory and virtual time: what must hold for any trace, policy and machine."""

from __future__ import annotations

import numpy as np
import pytest
from replay_runs import policies_of, run_trace, steps_of
from trace_builders import clustered_trace, trace_of

from cluster.policies.base import PolicySet
from cluster.policies.eviction.frequency import StaticScorer
from cluster.policies.eviction.lru import LruScorer
from cluster.policies.prefetch.base import Forecast
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.signals import Grid, Silent
from cluster.replay.link import CHUNKS_PER_EXPERT, ReplayLink
from cluster.replay.machine import Machine
from cluster.replay.memory import ReplayMemory, WantedExperts
from cluster.replay.schedule import grid_of
from cluster.replay.simulator import Simulator, run_together

POLICIES = ("lru+next-gate", "lru+whole-layer", "mrs+fmoe", "eam+eam", "fmoe+fmoe", "moesaic+moesaic", "belady+oracle")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("rate", "concurrency"), [(2e6, 1), (3e7, 1), (1e9, 1), (3e7, 3)])
def test_virtual_time_holds_its_rules(policy: str, rate: float, concurrency: int) -> None:
    trace = clustered_trace(num_requests=4, num_rows=6, seed=5)
    run = run_trace(trace, policy, slots=24, rate=rate, concurrency=concurrency)

    chunk_s = run.machine.expert_bytes / CHUNKS_PER_EXPERT / rate
    for before, after in zip(run.transfers, run.transfers[1:], strict=False):
        assert after.start_s >= before.end_s - 1e-12  # one chunk at a time
    for transfer in run.transfers:
        assert transfer.end_s - transfer.start_s == pytest.approx(transfer.num_chunks * chunk_s)  # never above the rate
        assert transfer.start_s >= transfer.asked_s
    for transfer in (t for t in run.transfers if t.is_demand):
        ahead_of_it = [t for t in run.transfers if not t.is_demand and transfer.asked_s < t.end_s <= transfer.start_s]
        assert sum(t.num_chunks for t in ahead_of_it) <= 1  # demand waits for one chunk of prefetch at most
    sent = sum(t.num_chunks for t in run.transfers)
    outcome = run.outcome
    assert sent == outcome.demand_chunks + outcome.prefetch_chunks
    assert sent - outcome.dropped_chunks == CHUNKS_PER_EXPERT * run.watched.inserts
    assert outcome.decode.uses == outcome.decode.timely + outcome.decode.late + outcome.decode.missed
    assert outcome.num_tokens == len(outcome.token_s) == 24


def test_prefetch_is_seen_to_be_used_late_and_wasted() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    roomy = run_trace(trace, "lru+next-gate", slots=24, rate=1e9).outcome
    tight = run_trace(trace, "lru+next-gate", slots=24, rate=2e7).outcome
    blind = run_trace(trace, "lru+whole-layer", slots=40, rate=1e9).outcome

    assert roomy.prefetch_used > 0 and roomy.decode.late == 0
    assert tight.decode.late > 0
    assert blind.prefetch_wasted > blind.prefetch_used
    assert roomy.decode.stall_s < run_trace(trace, "lru", slots=24, rate=1e9).outcome.decode.stall_s / 2


@pytest.mark.parametrize("policy", ["lru", "mrs", "eam+eam", "fmoe+fmoe", "moesaic+moesaic", "belady+oracle"])
def test_nothing_is_read_once_everything_is_resident(policy: str) -> None:
    trace = clustered_trace(num_requests=8, num_rows=10, seed=6)
    everything = trace.model.num_experts * len(trace.model.layers)

    run = run_trace(trace, policy, slots=everything)

    assert sum(t.num_chunks for t in run.transfers) == CHUNKS_PER_EXPERT * len(run.watched.resident)


def test_oracle_prefetch_hides_what_belady_cannot() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, clusters=0, seed=7)

    alone, ahead = (run_trace(trace, p, slots=24, rate=1e9).outcome.total_s for p in ("belady", "belady+oracle"))
    compute_s = run_trace(trace, "belady", slots=24, rate=1e15).outcome.total_s

    assert ahead - compute_s < 0.1 * (alone - compute_s)


def test_layer_that_needs_more_than_fits_is_computed_in_parts() -> None:
    rows = [[[e, (e + 1) % 6], [e, (e + 1) % 6]] for e in range(6)]
    trace = trace_of([rows], num_experts=6, num_prefill=6)

    run = run_trace(trace, "lru", slots=2)

    assert run.outcome.prefill.missed == 2 * 6
    assert len(run.watched.resident) == 2


def test_machines_that_share_a_pass_end_as_alone() -> None:
    trace = clustered_trace(num_requests=3, num_rows=5, seed=9)
    grid, steps, rates = grid_of(trace), steps_of(trace), (2e6, 3e7)
    policies = policies_of("fmoe+fmoe", grid, steps, 24, CostMeter(load_s=1e-3, layer_s=3e-4))
    machines = [Machine(num_slots=24, expert_bytes=3000, link_bytes_per_s=rate) for rate in rates]

    together = run_together([Simulator(grid, policies, machine) for machine in machines], steps)

    assert together == [run_trace(trace, "fmoe+fmoe", slots=24, rate=rate).outcome for rate in rates]


@pytest.mark.parametrize(("has_ring", "hears", "left"), [(False, True, 2), (True, False, 2), (True, True, 0)])
def test_ring_gives_up_what_is_used_last(has_ring: bool, hears: bool, left: int) -> None:
    """By value the layer before the last would stay."""
    prompt = [[[row % 4]] * 4 for row in range(16)]  # four layers of four experts, all used
    trace = trace_of([prompt], num_experts=4, num_prefill=len(prompt))
    worth = StaticScorer(np.repeat([2.0, 1.0, 3.0, 4.0], 4))
    policies = PolicySet(scorer=worth, predictor=None, listeners=(Silent(),) if hears else ())
    machine = Machine(num_slots=8, expert_bytes=3000, link_bytes_per_s=1e9)
    simulator = Simulator(grid_of(trace), policies, machine, has_ring=has_ring)

    simulator.run(steps_of(trace))

    resident, _, _ = simulator.memory.begin_layer(range(16))
    assert resident == [*range(4 * left, 4 * left + 4), *range(12, 16)]


def test_ring_changes_nothing_where_steps_are_small() -> None:
    trace = clustered_trace(num_requests=3, num_rows=5, seed=9)
    grid, steps, machine = (
        grid_of(trace),
        steps_of(trace),
        Machine(num_slots=24, expert_bytes=3000, link_bytes_per_s=3e7),
    )

    alike = [
        Simulator(
            grid, policies_of("mrs+next-gate", grid, steps, 24, CostMeter(load_s=1e-3, layer_s=3e-4)), machine, **ring
        )
        for ring in ({}, {"has_ring": True})
    ]

    with_ring, without = (simulator.run(steps) for simulator in alike)
    assert with_ring == without


def test_what_was_computed_may_leave_for_a_prefetch() -> None:
    grid = Grid(layers=(0, 1), num_experts=2, top_k=1)
    memory = ReplayMemory(grid, LruScorer(grid.size), ReplayLink(bytes_per_s=3.0, chunk_bytes=1.0), num_slots=1)
    memory.begin_layer([0])
    memory.load(0, 0.0)
    wanted = WantedExperts(Forecast(np.array([[0, 0], [1, 0]], np.float32), np.zeros((2, 2), np.float32)))

    memory.want(wanted, 1.0)
    memory.run_until(2.0)
    assert memory.begin_layer([2])[1:] == ([], [0]), "0 was being computed"

    memory.begin_layer([0])
    memory.unpin([0])
    memory.want(wanted, 3.0)
    memory.run_until(5.0)
    assert memory.begin_layer([2])[0] == [0]


def test_meter_tells_how_busy_demand_keeps_the_link() -> None:
    meter = CostMeter(load_s=2e-3, layer_s=1e-3)
    assert meter.costs().busy == 0

    for _ in range(1000):
        meter.note_layer(compute_s=2e-3, demand_s=3e-3, took_s=4e-3)

    costs = meter.costs()
    assert (costs.load_s, costs.layer_s, costs.busy) == pytest.approx((2e-3, 2e-3, 0.75))
