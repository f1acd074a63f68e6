"""Moesaic's eviction and prefetch: what is used latest leaves, what pays is fetched, the next gate is weighed."""

from __future__ import annotations

import copy
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cluster.policies.eviction.eviction_order import EvictionOrder
from cluster.policies.eviction.frequency import StaticScorer
from cluster.policies.eviction.lru import LruScorer
from cluster.policies.eviction.moesaic import MoesaicScorer
from cluster.policies.next_use.estimate import NextUse
from cluster.policies.prefetch.base import BEFORE_FIRST, Forecast
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.prefetch.moesaic import LinkCosts, MoesaicPredictor
from cluster.policies.signals import GateSignal, Grid, StepSignal

GRID = Grid(layers=(0, 1, 2), num_experts=8, top_k=2)
DIM = 8
VECTORS = np.random.default_rng(0).standard_normal((100, DIM)).astype(np.float32)
IDLE = LinkCosts(load_s=1.0, layer_s=1.0, busy=0.0)


def step_of(token: int) -> StepSignal:
    return StepSignal((1,), VECTORS[token][None], np.ones(1, np.int64), np.ones(1, np.bool_))


def gate_of(row: int, chosen: tuple[int, ...], ahead: tuple[int, ...] | None = None) -> GateSignal:
    counts = np.zeros((1, GRID.num_experts), np.float32)
    counts[0, list(chosen)] = 1
    probs = (counts * 0.4 + 0.2 / GRID.num_experts).astype(np.float32)
    told: np.ndarray | None = None
    if ahead is not None:
        told = np.full((1, GRID.num_experts), 0.2 / GRID.num_experts, np.float32)
        told[0, list(ahead)] += 0.4
    return GateSignal(row, probs, counts, told)


def chosen_by(token: int, row: int) -> tuple[int, int]:
    return (2 * token + row) % GRID.num_experts, (2 * token + row + 1) % GRID.num_experts


def teach(next_use: NextUse, tokens: list[int]) -> None:
    for token in tokens:
        next_use.on_step(step_of(token))
        next_use.learn_from_step()
        for row in range(GRID.num_layers):
            next_use.on_gate(gate_of(row, chosen_by(token, row)))
        next_use.on_step_end()


def hits(order: EvictionOrder, next_use: NextUse | None, uses: list[list[list[int]]], slots: int) -> int:
    """Of a memory of `slots` experts; uses: by step and layer."""
    resident: set[int] = set()
    count = 0
    for step in uses:
        if next_use is not None:
            next_use.on_step(step_of(0))
        for row, experts in enumerate(step):
            if next_use is not None:
                next_use.on_gate(gate_of(row, tuple(experts)))
            needed = [row * GRID.num_experts + expert for expert in experts]
            kept = np.zeros(GRID.size, np.bool_)
            kept[needed] = True
            for index in needed:
                if index in resident:
                    count += 1
                    order.touch((index,))
                    continue
                if len(resident) == slots:
                    victim = order.victim(kept)
                    assert victim is not None and victim in resident and victim not in needed
                    resident.remove(victim)
                    order.on_evict(victim)
                resident.add(index)
                order.on_insert(index)
        if next_use is not None:
            next_use.on_step_end()
    return count


def hits_of_ours(next_use: NextUse, uses: list[list[list[int]]], slots: int) -> int:
    return hits(EvictionOrder(MoesaicScorer(next_use), GRID.size), next_use, uses, slots)


def hits_of_lru(uses: list[list[list[int]]], slots: int) -> int:
    return hits(EvictionOrder(LruScorer(GRID.size), GRID.size), None, uses, slots)


def test_beats_lru_where_lru_thrashes() -> None:
    uses = [[[0, 1], [0, 1], [0, 1]]] * 60  # six experts in turn through four slots: lru never hits
    assert hits_of_lru(uses, slots=4) == 0
    assert hits_of_ours(NextUse(GRID, embedding_dim=DIM), uses, slots=4) >= 0.9 * 59 * 2, "as Belady: one pair stays"


def test_loses_little_where_nothing_can_be_known() -> None:
    rng = np.random.default_rng(3)
    uses = [[rng.choice(8, size=2, replace=False).tolist() for _ in range(3)] for _ in range(250)]
    ours, num_uses = hits_of_ours(NextUse(GRID, embedding_dim=DIM), uses, slots=12), 250 * 6
    assert hits_of_lru(uses, slots=12) / num_uses - 0.03 <= ours / num_uses <= 12 / GRID.size + 0.03


def test_falls_back_to_popularity_when_what_it_learned_stops_being_true() -> None:
    """Learned where the present use tells the next one; then uses are drawn by popularity alone."""
    rng = np.random.default_rng(6)
    next_use = NextUse(GRID, embedding_dim=DIM)
    pairs = [(0, 1), (2, 3), (4, 5), (6, 7)]
    hits_of_ours(next_use, [[list(pairs[t % 4])] * 3 for t in range(150)], slots=6)
    popularity = np.array([8, 1, 7, 1, 6, 1, 5, 1]) / 30
    uses = [[rng.choice(8, size=2, replace=False, p=popularity).tolist() for _ in range(3)] for _ in range(500)]
    num_uses = 500 * 6
    ours = hits_of_ours(next_use, uses, slots=12)
    static = hits(EvictionOrder(StaticScorer(np.tile(popularity, (3, 1))), GRID.size), None, uses, slots=12)
    assert ours / num_uses >= static / num_uses - 0.02
    assert ours / num_uses <= static / num_uses + 0.02, "nothing more is to be known"


def forecast(costs: LinkCosts, next_use: NextUse, token: int, rows_done: int = 0) -> Forecast:
    predictor = MoesaicPredictor(GRID, next_use, lambda: costs)
    next_use.on_step(step_of(token))
    for row in range(rows_done):
        next_use.on_gate(gate_of(row, chosen_by(token, row)))
    made = predictor.predict(rows_done - 1 if rows_done else BEFORE_FIRST)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def taught() -> NextUse:
    next_use = NextUse(GRID, embedding_dim=DIM)
    teach(next_use, np.random.default_rng(4).integers(4, size=250).tolist())
    return next_use


def test_token_of_the_step_is_fetched_for_before_the_first_layer(taught: NextUse) -> None:
    made = forecast(IDLE, taught, token=2)
    for row in range(GRID.num_layers):
        assert (made.priority[row, list(chosen_by(2, row))] > 0).all()
        assert set(made.probability[row].argsort()[-2:].tolist()) == set(chosen_by(2, row))
    assert made.priority[0, list(chosen_by(2, 0))].min() > made.priority[2, list(chosen_by(2, 2))].max(), "sooner first"


def test_busy_link_fetches_no_more_than_an_idle_one(taught: NextUse) -> None:
    idle = forecast(IDLE, taught, token=1, rows_done=2).priority > 0
    busy = forecast(LinkCosts(load_s=1.0, layer_s=1.0, busy=1.0), taught, token=1, rows_done=2).priority > 0
    assert (busy <= idle).all() and busy.sum() < idle.sum()


def test_busy_link_whose_loads_do_not_give_way_fetches_nothing(taught: NextUse) -> None:
    """It moves the same bytes sooner or later; a guess that fails is moved for nothing."""
    costs = LinkCosts(load_s=1.0, layer_s=1.0, busy=1.0, gives_way=False)
    taught.on_step(step_of(1))
    assert MoesaicPredictor(GRID, taught, lambda: costs).predict(BEFORE_FIRST) is None
    taught.on_step_end()


@given(
    load_s=st.floats(1e-5, 1),
    layer_s=st.floats(1e-5, 1),
    busy=st.floats(0, 1),
    cpu_s=st.floats(0, 1),
    ahead=st.integers(1, 60),
)
def test_price_rises_with_every_cost_and_falls_with_what_is_hidden(
    load_s: float, layer_s: float, busy: float, cpu_s: float, ahead: int
) -> None:
    costs = LinkCosts(load_s=load_s, layer_s=layer_s, busy=busy, cpu_s=cpu_s)
    price = float(costs.pays_from(ahead))

    assert price > 0
    assert float(costs.pays_from(ahead + 1)) <= price
    if price < 1:
        assert float(replace(costs, busy=(busy + 1) / 2).pays_from(ahead)) >= price * (1 - 1e-9)
    assert float(replace(costs, cpu_s=cpu_s + 0.1).pays_from(ahead)) > price
    assert float(replace(costs, gives_way=False).pays_from(ahead)) >= price


def test_nothing_is_fetched_when_it_can_hide_nothing(taught: NextUse) -> None:
    made = forecast(LinkCosts(load_s=1.0, layer_s=1e-4, busy=1.0), taught, token=1)
    assert not (made.priority > 0).any()


def test_young_meter_says_the_mean_of_what_it_saw_and_an_old_one_follows() -> None:
    meter = CostMeter(load_s=1e-3, layer_s=1.0)
    for took_s in (2e-3, 4e-3):
        meter.note_layer(compute_s=1e-3, demand_s=0.0, took_s=took_s)
    assert meter.costs().layer_s == pytest.approx(1e-3), "nothing of the first guess is left"
    assert meter.costs().busy == pytest.approx(1 - 1 / 3), "waited for two of three milliseconds"

    for _ in range(1000):
        meter.note_layer(compute_s=1e-3, demand_s=0.0, took_s=1e-3)
    assert meter.costs().busy == pytest.approx(0, abs=1e-6)


def test_layers_passed_are_forecast_for_the_next_step(taught: NextUse) -> None:
    made = forecast(IDLE, taught, token=1, rows_done=2)
    uncertain, certain = made.probability[0].max(), made.probability[2].max()
    assert uncertain < 0.6 < certain, "the next token is not known, this one is"


def test_probability_stays_one_when_the_next_gate_speaks() -> None:
    """The next gate's word counts as much as it proved right, by layer: of row 1 always, of row 2 never."""
    next_use = NextUse(GRID, embedding_dim=DIM)
    predictor = MoesaicPredictor(GRID, next_use, lambda: IDLE)
    rng = np.random.default_rng(5)
    told_right, told_wrong = [], []
    for t in range(300):
        step = step_of(int(rng.integers(100)))
        chosen = [tuple(rng.choice(8, size=2, replace=False).tolist()) for _ in range(3)]
        random = tuple(rng.choice(8, size=2, replace=False).tolist())
        next_use.on_step(step)
        for row, ahead in enumerate((chosen[1], random, None)):
            gate = gate_of(row, chosen[row], ahead)
            next_use.on_gate(gate)
            made = predictor.predict(row)
            assert made is not None and (made.probability >= 0).all() and (made.probability <= 1).all()
            if t >= 180 and row == 0:
                told_right.append(made.probability[1, list(chosen[1])].mean())
            if t >= 180 and row == 1:
                told_wrong.append(made.probability[2, list(random)].mean())
        next_use.on_step_end()
    assert np.mean(told_right) > 0.7
    assert np.mean(told_wrong) == pytest.approx(GRID.top_k / GRID.num_experts, abs=0.1)


def test_gates_of_the_step_tell_of_layers_further_on() -> None:
    """Row 0 chooses at random, row 2 the same: nothing is known before the step, all of it after the first gate."""
    next_use, rng = NextUse(GRID, embedding_dim=DIM), np.random.default_rng(7)
    predictor = MoesaicPredictor(GRID, next_use, lambda: IDLE)
    before, after = [], []
    for t in range(260):
        chosen = tuple(rng.choice(8, size=2, replace=False).tolist())
        next_use.on_step(step_of(int(rng.integers(100))))
        at_begin = predictor.predict(BEFORE_FIRST)
        next_use.on_gate(gate_of(0, chosen))
        after_gate = predictor.predict(0)
        assert at_begin is not None and after_gate is not None
        if t >= 180:
            before.append(at_begin.probability[2, list(chosen)].mean())
            after.append(after_gate.probability[2, list(chosen)].mean())
        next_use.on_gate(gate_of(1, tuple(rng.choice(8, size=2, replace=False).tolist())))
        next_use.on_gate(gate_of(2, chosen))
        next_use.on_step_end()
    assert np.mean(before) < 0.4 and np.mean(after) > 0.7


def test_prefetch_prices_itself_out_when_tokens_stop_telling(taught: NextUse) -> None:
    """What was learned of tokens is void: within some hundred steps hardly anything uncertain is fetched."""
    next_use, rng = copy.deepcopy(taught), np.random.default_rng(8)
    predictor = MoesaicPredictor(GRID, next_use, lambda: LinkCosts(load_s=1.0, layer_s=1.0, busy=0.8))
    wanted = []
    for _ in range(400):
        next_use.on_step(step_of(int(rng.integers(4))))
        made = predictor.predict(BEFORE_FIRST)
        assert made is not None
        wanted.append(int((made.priority > 0).sum()))
        for row in range(GRID.num_layers):
            next_use.on_gate(gate_of(row, tuple(rng.choice(8, size=2, replace=False).tolist())))
        next_use.on_step_end()
    assert np.mean(wanted[:5]) >= 5, "two of each layer, as taught"
    assert np.mean(wanted[-100:]) < 0.5


def test_a_load_that_costs_as_much_processor_time_as_it_hides_is_never_fetched_ahead(taught: NextUse) -> None:
    def wanted(cpu_s: float) -> int | None:
        costs = LinkCosts(load_s=1.0, layer_s=1.0, busy=0.0, cpu_s=cpu_s)
        predictor, next_use = MoesaicPredictor(GRID, taught, lambda: costs), taught
        next_use.on_step(step_of(1))
        made = predictor.predict(BEFORE_FIRST)
        next_use.on_step_end()
        return None if made is None else int((made.priority > 0).sum())

    cheap, dear, void = (wanted(cpu_s) for cpu_s in (0.0, 0.9, 1.0))

    assert void is None
    assert cheap is not None
    assert dear is not None
    assert dear < cheap
