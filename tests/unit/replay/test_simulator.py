"""The replay's memory and virtual time: what must hold for any trace, policy and machine."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from trace_builders import DIM, clustered_trace, trace_of

from cluster.policies.base import PolicySet, Scorer
from cluster.policies.build import PolicyContext, build_policies
from cluster.policies.eviction.eviction_order import EvictionOrder
from cluster.policies.eviction.frequency import StaticScorer
from cluster.policies.eviction.lru import LruScorer
from cluster.policies.future import Future, UsesToCome
from cluster.policies.prefetch.base import Forecast
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.signals import Grid, Silent
from cluster.policies.trace import GateTrace
from cluster.replay.demand import DemandRun, replay_demand
from cluster.replay.link import CHUNKS_PER_EXPERT, LinkTransfer, ReplayLink
from cluster.replay.machine import Machine, Processor
from cluster.replay.memory import ReplayMemory, WantedExperts
from cluster.replay.outcome import ReplayOutcome
from cluster.replay.schedule import ReplayStep, build_steps, grid_of
from cluster.replay.simulator import Simulator, run_together

EXPERTS, TOP_K = 6, 2


class WatchedOrder(EvictionOrder):
    """Also counts what the memory does with it."""

    def __init__(self, scorer: Scorer, size: int, num_slots: int) -> None:
        super().__init__(scorer, size)
        self.num_slots = num_slots
        self.resident: set[int] = set()
        self.inserts = 0

    def on_insert(self, index: int) -> None:
        assert index not in self.resident
        self.resident.add(index)
        self.inserts += 1
        assert len(self.resident) <= self.num_slots
        super().on_insert(index)

    def on_evict(self, index: int) -> None:
        self.resident.remove(index)
        super().on_evict(index)


@dataclass
class Run:
    outcome: ReplayOutcome
    transfers: list[LinkTransfer]
    watched: WatchedOrder
    machine: Machine


def _steps(trace: GateTrace, concurrency: int = 1) -> list[ReplayStep]:
    return build_steps(trace, concurrency=concurrency, order=range(len(trace.requests)))


def _policies(policy: str, grid: Grid, steps: Sequence[ReplayStep], slots: int, meter: CostMeter) -> PolicySet:
    future = Future(UsesToCome(grid, [needed for step in steps for needed in step.needed]))
    frequency = np.arange(grid.size, dtype=float).reshape(grid.num_layers, -1)
    return build_policies(
        policy,
        PolicyContext(
            grid=grid, num_slots=slots, embedding_dim=DIM, frequency=frequency, future=future, costs=meter.costs
        ),
    )


def _run(
    trace: GateTrace, policy: str, *, slots: int, rate: float = 1e9, concurrency: int = 1, **processor: float
) -> Run:
    grid, steps = grid_of(trace), _steps(trace, concurrency)
    simulated = Machine(
        num_slots=slots, expert_bytes=3000, link_bytes_per_s=rate, processor=replace(Processor(), **processor)
    )
    meter = CostMeter(load_s=simulated.load_s, layer_s=3e-4)
    policies = _policies(policy, grid, steps, slots, meter)
    transfers: list[LinkTransfer] = []
    simulator = Simulator(grid, policies, simulated, transfers.append, meter)
    simulator.memory.residents.order = watched = WatchedOrder(policies.scorer, grid.size, slots)
    return Run(simulator.run(steps), transfers, watched, simulated)


def _demand(grid: Grid, policy: str, slots: Sequence[int], steps: Sequence[ReplayStep]) -> list[DemandRun]:
    meter = CostMeter(load_s=1e-3, layer_s=3e-4)
    return replay_demand(grid, _policies(policy, grid, steps, max(slots), meter), slots, steps)


choices = st.lists(
    st.lists(st.permutations(range(EXPERTS)).map(lambda p: p[:TOP_K]), min_size=2, max_size=2), min_size=1, max_size=12
)
CACHING = ("lru", "lru-per-layer", "lfu", "static", "mrs", "eam", "fmoe")


@settings(max_examples=20, deadline=None)
@given(requests=st.lists(choices, min_size=1, max_size=2), concurrency=st.integers(1, 2))
def test_belady_misses_least_at_every_cache_size(requests: list[list[list[list[int]]]], concurrency: int) -> None:
    trace = trace_of(requests, num_experts=EXPERTS)
    grid, steps = grid_of(trace), _steps(trace, concurrency)
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
    (run,) = _demand(grid_of(trace), "lru", [slots], _steps(trace))

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
    steps = _steps(trace)
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
    grid, steps = grid_of(trace), _steps(trace, concurrency)
    (run,) = _demand(grid, policy, [slots], steps)

    for rate in (2e6, 3e7):
        simulated = _run(
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


POLICIES = ("lru+next-gate", "lru+whole-layer", "mrs+fmoe", "eam+eam", "fmoe+fmoe", "moesaic+moesaic", "belady+oracle")


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize(("rate", "concurrency"), [(2e6, 1), (3e7, 1), (1e9, 1), (3e7, 3)])
def test_virtual_time_holds_its_rules(policy: str, rate: float, concurrency: int) -> None:
    trace = clustered_trace(num_requests=4, num_rows=6, seed=5)
    run = _run(trace, policy, slots=24, rate=rate, concurrency=concurrency)

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

    roomy = _run(trace, "lru+next-gate", slots=24, rate=1e9).outcome
    tight = _run(trace, "lru+next-gate", slots=24, rate=2e7).outcome
    blind = _run(trace, "lru+whole-layer", slots=40, rate=1e9).outcome

    assert roomy.prefetch_used > 0 and roomy.decode.late == 0
    assert tight.decode.late > 0
    assert blind.prefetch_wasted > blind.prefetch_used
    assert roomy.decode.stall_s < _run(trace, "lru", slots=24, rate=1e9).outcome.decode.stall_s / 2


@pytest.mark.parametrize("policy", ["lru", "mrs", "eam+eam", "fmoe+fmoe", "moesaic+moesaic", "belady+oracle"])
def test_nothing_is_read_once_everything_is_resident(policy: str) -> None:
    trace = clustered_trace(num_requests=8, num_rows=10, seed=6)
    everything = trace.model.num_experts * len(trace.model.layers)

    run = _run(trace, policy, slots=everything)

    assert sum(t.num_chunks for t in run.transfers) == CHUNKS_PER_EXPERT * len(run.watched.resident)


def test_oracle_prefetch_hides_what_belady_cannot() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, clusters=0, seed=7)

    alone, ahead = (_run(trace, p, slots=24, rate=1e9).outcome.total_s for p in ("belady", "belady+oracle"))
    compute_s = _run(trace, "belady", slots=24, rate=1e15).outcome.total_s

    assert ahead - compute_s < 0.1 * (alone - compute_s)


def test_layer_that_needs_more_than_fits_is_computed_in_parts() -> None:
    rows = [[[e, (e + 1) % EXPERTS], [e, (e + 1) % EXPERTS]] for e in range(EXPERTS)]
    trace = trace_of([rows], num_experts=EXPERTS, num_prefill=EXPERTS)

    run = _run(trace, "lru", slots=2)

    assert run.outcome.prefill.missed == 2 * EXPERTS
    assert len(run.watched.resident) == 2


def test_machines_that_share_a_pass_end_as_alone() -> None:
    trace = clustered_trace(num_requests=3, num_rows=5, seed=9)
    grid, steps, rates = grid_of(trace), _steps(trace), (2e6, 3e7)
    policies = _policies("fmoe+fmoe", grid, steps, 24, CostMeter(load_s=1e-3, layer_s=3e-4))
    machines = [Machine(num_slots=24, expert_bytes=3000, link_bytes_per_s=rate) for rate in rates]

    together = run_together([Simulator(grid, policies, machine) for machine in machines], steps)

    assert together == [_run(trace, "fmoe+fmoe", slots=24, rate=rate).outcome for rate in rates]


@pytest.mark.parametrize(("has_ring", "hears", "left"), [(False, True, 2), (True, False, 2), (True, True, 0)])
def test_ring_gives_up_what_is_used_last(has_ring: bool, hears: bool, left: int) -> None:
    """By value the layer before the last would stay."""
    prompt = [[[row % 4]] * 4 for row in range(16)]  # four layers of four experts, all used
    trace = trace_of([prompt], num_experts=4, num_prefill=len(prompt))
    worth = StaticScorer(np.repeat([2.0, 1.0, 3.0, 4.0], 4))
    policies = PolicySet(scorer=worth, predictor=None, listeners=(Silent(),) if hears else ())
    machine = Machine(num_slots=8, expert_bytes=3000, link_bytes_per_s=1e9)
    simulator = Simulator(grid_of(trace), policies, machine, has_ring=has_ring)

    simulator.run(_steps(trace))

    resident, _, _ = simulator.memory.begin_layer(range(16))
    assert resident == [*range(4 * left, 4 * left + 4), *range(12, 16)]


def test_ring_changes_nothing_where_steps_are_small() -> None:
    trace = clustered_trace(num_requests=3, num_rows=5, seed=9)
    grid, steps, machine = grid_of(trace), _steps(trace), Machine(num_slots=24, expert_bytes=3000, link_bytes_per_s=3e7)

    alike = [
        Simulator(
            grid, _policies("mrs+next-gate", grid, steps, 24, CostMeter(load_s=1e-3, layer_s=3e-4)), machine, **ring
        )
        for ring in ({}, {"has_ring": True})
    ]

    with_ring, without = (simulator.run(steps) for simulator in alike)
    assert with_ring == without


def test_forecasts_cost_time_only_where_compute_waits_for_them() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    def total_s(policy: str, **machine: float) -> float:
        return _run(trace, policy, slots=24, rate=3e7, **machine).outcome.total_s

    free, late = total_s("lru+next-gate"), total_s("lru+next-gate", predict_s=2e-4)
    waited_for = total_s("lru+next-gate", predict_s=2e-4, predict_on_path=True)

    assert free < late < waited_for <= free + 32 * 6 * 2e-4 + 1e-9
    assert total_s("lru", predict_s=2e-4, predict_on_path=True) == total_s("lru")


def test_time_of_a_step_is_compute_and_what_is_waited_for() -> None:
    trace = trace_of([[[[0, 1]], [[0, 2]]]], num_experts=4)

    run = _run(trace, "lru", slots=2, rate=3e6)  # an expert takes 1 ms

    first = 1e-4 + 1e-3 + 1e-3 + 1e-4  # the second arrives while the first computes
    second = 1e-4 + 1e-3 + 1e-4  # expert 0 is resident and computes meanwhile
    assert run.outcome.token_s == pytest.approx([first, second])
    assert run.outcome.decode.stall_s == pytest.approx(1e-3 + 9e-4 + 9e-4)


def test_attention_takes_longer_with_every_sequence() -> None:
    trace = trace_of([[[[0, 1]], [[0, 1]]], [[[0, 1]], [[0, 1]]]], num_experts=4)

    run = _run(trace, "lru", slots=2, rate=3e6, concurrency=2, base_s=1e-3, sequence_s=5e-4)

    assert run.outcome.token_s[-1] == pytest.approx(1e-3 + 5e-4 + 2e-4)


def test_layers_take_different_times_but_the_same_on_average_and_in_every_replay() -> None:
    trace = trace_of([[[[0, 1]]] * 500], num_experts=4)
    runs = [_run(trace, "lru", slots=4, base_s=1e-3, spread=spread).outcome for spread in (0.0, 0.3, 0.3)]
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
        runs = [_run(trace, "lru+next-gate", slots=24, rate=3e6, base_s=s, spread=spread) for s in lengths_s]
        hits = [(counts.late + counts.timely) / counts.uses for counts in (run.outcome.decode for run in runs)]
        return float(np.abs(np.diff(hits)).max())

    assert largest_jump(0.3) < 0.5 * largest_jump(0.0)


def test_computing_takes_longer_beside_a_busy_link() -> None:
    trace = trace_of([[[[0, 1]], [[0, 1]]]], num_experts=4)

    run = _run(trace, "lru", slots=2, rate=3e6, expert_s=2e-3, contention=0.5)  # an expert arrives every ms

    beside = 1e-3 + (2e-3 - 1e-3 / 1.5)  # a millisecond of the first expert, then the link is idle
    assert run.outcome.token_s == pytest.approx([1e-4 + 1e-3 + beside + 2e-3, 1e-4 + 2 * 2e-3])


def test_what_is_fetched_ahead_slows_computing_down() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    alone, beside = (
        [_run(trace, "lru+next-gate", slots=slots, rate=3e7, contention=share).outcome for slots in (24, 48)]
        for share in (0.0, 0.3)
    )

    assert beside[0].total_s > 1.02 * alone[0].total_s
    assert beside[1].token_s[-7:] == pytest.approx(alone[1].token_s[-7:]), "with everything resident nothing is loaded"


def test_search_takes_time_from_computing_not_from_waiting() -> None:
    rows = [[[0, 1], [2, 3]]] * 12
    resident = _run(trace_of([rows], num_experts=4), "lru+next-gate", slots=8, predict_s=2e-4, search_s=1e-4)

    step_s = 1e-4 + 2 * (1e-4 + 2e-4 + 1e-4)  # one search as the step begins, one after every gate
    assert resident.outcome.token_s[-1] == pytest.approx(step_s)

    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)
    free, costly = (
        _run(trace, "lru+next-gate", slots=12, rate=2e6, predict_s=2e-4, search_s=search_s).outcome
        for search_s in (0.0, 1e-4)
    )
    num_searches = len(costly.token_s) * 7
    assert costly.total_s - free.total_s < 0.7 * num_searches * 1e-4


def test_forecast_of_a_gate_that_is_long_past_still_counts_from_when_it_is_there() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    def begun_in_time(predict_s: float, predict_spread: float = 0.0) -> int:
        run = _run(trace, "lru+next-gate", slots=24, rate=3e7, predict_s=predict_s, predict_spread=predict_spread)
        return run.outcome.decode.timely + run.outcome.decode.late

    prompt, late, never = (begun_in_time(predict_s=predict_s) for predict_s in (1e-5, 5e-4, 1.0))
    assert prompt > late >= never
    assert late < begun_in_time(predict_s=5e-4, predict_spread=1.0) < prompt, "some of them come in time"


def test_chunk_ahead_begins_after_its_thread_woke() -> None:
    trace = clustered_trace(num_requests=4, num_rows=8, seed=5)

    sent = [
        _run(trace, "lru+next-gate", slots=24, rate=3e7, lag_s=lag_s).outcome.prefetch_chunks
        for lag_s in (0.0, 1e-4, 1e-3)
    ]

    assert sent[0] > sent[1] > sent[2]


def test_what_was_computed_may_leave_for_a_load_ahead() -> None:
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


def _sequences(steps: Sequence[ReplayStep]) -> list[tuple[int, ...]]:
    return [step.signal.sequences for step in steps]


def test_next_sequence_joins_when_one_ends() -> None:
    trace = trace_of([[[[0]]] * 2, [[[1]]] * 3, [[[0]], [[1]]]], num_experts=2)

    steps = build_steps(trace, concurrency=2, order=[0, 1, 2])

    assert _sequences(steps) == [(0, 1), (0, 1), (1, 2), (2,)]
    assert [step.ended for step in steps] == [(), (0,), (1,), (2,)]
    assert [step.needed for step in steps] == [((0, 1),), ((0, 1),), ((0, 1),), ((1,),)]


def test_prompt_is_one_step_whose_signals_are_means() -> None:
    trace = trace_of([[[[0]], [[1]], [[0]], [[0]], [[2]]]], num_experts=4, num_prefill=4)

    prompt, token = build_steps(trace, concurrency=1, order=[0])

    np.testing.assert_allclose(prompt.gates[0].probs, [[0.75, 0.25, 0, 0]])
    np.testing.assert_array_equal(prompt.gates[0].counts, [[3, 1, 0, 0]])
    assert prompt.rows == ((3, 1),) and not prompt.is_decode and prompt.num_tokens == 0
    assert token.needed == ((2,),) and token.is_decode and token.num_tokens == 1


def test_meter_tells_how_busy_demand_keeps_the_link() -> None:
    meter = CostMeter(load_s=2e-3, layer_s=1e-3)
    assert meter.costs().busy == 0

    for _ in range(1000):
        meter.note_layer(compute_s=2e-3, demand_s=3e-3, took_s=4e-3)

    costs = meter.costs()
    assert (costs.load_s, costs.layer_s, costs.busy) == pytest.approx((2e-3, 2e-3, 0.75))
