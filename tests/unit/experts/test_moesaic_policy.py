"""Moesaic's eviction and prefetch: what is used latest leaves, what pays is fetched, the next gate is weighed."""

from __future__ import annotations

import numpy as np
import pytest

from actors.experts.next_use import NextUse
from actors.experts.policies.lowest_score import LowestScorePolicy
from actors.experts.policies.lru import LruPolicy
from actors.experts.policies.moesaic import MoesaicScorer
from actors.experts.predict.base import BEFORE_FIRST, Forecast
from actors.experts.predict.moesaic import LinkCosts, MoesaicPredictor
from actors.experts.signals import GateSignal, Grid, StepSignal
from cluster.types import ExpertId

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
        next_use.ask()
        for row in range(GRID.num_layers):
            next_use.on_gate(gate_of(row, chosen_by(token, row)))
        next_use.on_step_end()


def hits(
    policy: LruPolicy | LowestScorePolicy, next_use: NextUse | None, uses: list[list[list[int]]], slots: int
) -> int:
    """Of a memory of `slots` experts; uses: by step and layer."""
    resident: set[ExpertId] = set()
    count = 0
    for step in uses:
        if next_use is not None:
            next_use.on_step(step_of(0))
        for row, experts in enumerate(step):
            if next_use is not None:
                next_use.on_gate(gate_of(row, tuple(experts)))
            needed = [ExpertId(row, expert) for expert in experts]
            for expert in needed:
                if expert in resident:
                    count += 1
                    policy.on_use(expert)
                    continue
                if len(resident) == slots:
                    victim = policy.choose_victim(needed)
                    assert victim is not None and victim in resident and victim not in needed
                    resident.remove(victim)
                    policy.on_evict(victim)
                resident.add(expert)
                policy.on_insert(expert)
        if next_use is not None:
            next_use.on_step_end()
    return count


def test_beats_lru_where_lru_thrashes() -> None:
    uses = [[[0, 1], [0, 1], [0, 1]]] * 60  # six experts in turn through four slots: lru never hits
    next_use = NextUse(GRID, embedding_dim=DIM)
    ours = hits(LowestScorePolicy(GRID, MoesaicScorer(next_use)), next_use, uses, slots=4)
    assert hits(LruPolicy(), None, uses, slots=4) == 0
    assert ours >= 0.9 * 59 * 2, "as Belady: one pair stays"


def test_loses_little_where_nothing_can_be_known() -> None:
    rng = np.random.default_rng(3)
    uses = [[rng.choice(8, size=2, replace=False).tolist() for _ in range(3)] for _ in range(400)]
    next_use = NextUse(GRID, embedding_dim=DIM)
    ours = hits(LowestScorePolicy(GRID, MoesaicScorer(next_use)), next_use, uses, slots=12)
    num_uses = 400 * 6
    assert ours / num_uses == pytest.approx(hits(LruPolicy(), None, uses, slots=12) / num_uses, abs=0.03)


def forecast(costs: LinkCosts, next_use: NextUse, token: int, rows_done: int = 0) -> Forecast:
    predictor = MoesaicPredictor(GRID, next_use, lambda: costs)
    next_use.on_step(step_of(token))
    predictor.on_step(step_of(token))
    for row in range(rows_done):
        gate = gate_of(row, chosen_by(token, row))
        next_use.on_gate(gate)
        predictor.on_gate(gate)
    made = predictor.predict(rows_done - 1 if rows_done else BEFORE_FIRST)
    assert made is not None
    return made


@pytest.fixture(scope="module")
def taught() -> NextUse:
    next_use = NextUse(GRID, embedding_dim=DIM)
    teach(next_use, np.random.default_rng(4).integers(4, size=400).tolist())
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


def test_nothing_is_fetched_when_it_can_hide_nothing(taught: NextUse) -> None:
    made = forecast(LinkCosts(load_s=1.0, layer_s=1e-4, busy=1.0), taught, token=1)
    assert not (made.priority > 0).any()


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
    for t in range(500):
        step = step_of(int(rng.integers(100)))
        chosen = [tuple(rng.choice(8, size=2, replace=False).tolist()) for _ in range(3)]
        random = tuple(rng.choice(8, size=2, replace=False).tolist())
        next_use.on_step(step)
        predictor.on_step(step)
        for row, ahead in enumerate((chosen[1], random, None)):
            gate = gate_of(row, chosen[row], ahead)
            next_use.on_gate(gate)
            predictor.on_gate(gate)
            made = predictor.predict(row)
            assert made is not None and (made.probability >= 0).all() and (made.probability <= 1).all()
            if t >= 300 and row == 0:
                told_right.append(made.probability[1, list(chosen[1])].mean())
            if t >= 300 and row == 1:
                told_wrong.append(made.probability[2, list(random)].mean())
        next_use.on_step_end()
    assert np.mean(told_right) > 0.7
    assert np.mean(told_wrong) == pytest.approx(GRID.top_k / GRID.num_experts, abs=0.1)
