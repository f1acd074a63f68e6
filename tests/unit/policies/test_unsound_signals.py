"""Numbers that are none, and steps that broke off, leave no trace in any policy, predictor or memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import pytest
from expert_builders import ExpertFile, open_store, write_experts

from actors.experts.memory.store import ExpertStore
from actors.experts.policy_runner import LayerTimes, PolicyRunner
from cluster.policies.base import PolicySet
from cluster.policies.build import PolicyContext, build_policies
from cluster.policies.eviction.score_snapshot import ScoreSnapshot
from cluster.policies.prefetch.base import BEFORE_FIRST, Forecast
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.prefetch.moesaic import LinkCosts
from cluster.policies.signals import GateSignal, Grid, StepSignal

GRID = Grid((0, 1, 2), 8, 2)
DIM = 6
TIMES = LayerTimes(1e-3, 0.0, 1e-3)
POLICIES = (
    "lru+none",
    "lru-per-layer+next-gate",
    "lfu+next-gate",
    "mrs+whole-layer",
    "eam+eam",
    "fmoe+fmoe",
    "moesaic+moesaic",
)
BAD = (np.nan, np.inf, -np.inf)


def _policies(name: str) -> PolicySet:
    costs = LinkCosts(load_s=1e-3, layer_s=1e-3, busy=0.0)
    return build_policies(name, PolicyContext(grid=GRID, num_slots=6, embedding_dim=DIM, costs=lambda: costs))


@dataclass
class Steps:
    """Random steps of two sequences: the same for the same seed."""

    seed: int = 0

    def __post_init__(self) -> None:
        self.random = np.random.default_rng(self.seed)

    def step(self) -> StepSignal:
        embeddings = self.random.standard_normal((2, DIM)).astype(np.float32)
        return StepSignal((1, 2), embeddings, np.ones(2, np.int64), np.ones(2, np.bool_))

    def gate(self, row: int) -> GateSignal:
        probs = self.random.dirichlet(np.ones(8), size=2).astype(np.float32)
        counts = np.zeros((2, 8), np.float32)
        np.put_along_axis(counts, np.argsort(-probs, axis=1)[:, :2], 1.0, axis=1)
        ahead = None if row == 2 else self.random.dirichlet(np.ones(8), size=2).astype(np.float32)
        return GateSignal(row, probs, counts, ahead)


def _pass(policies: PolicySet, steps: Steps, num_layers: int = 3) -> list[np.ndarray]:
    """Hear one step, whole or broken off after so many layers; what the policies say meanwhile."""
    said: list[np.ndarray] = []

    def look(row: int) -> None:
        said.append(policies.scorer.scores().copy())
        forecast = policies.predictor.predict(row) if policies.predictor else None
        if forecast is not None:
            said.extend((forecast.priority.copy(), forecast.probability.copy()))

    step = steps.step()
    for listener in policies.listeners:
        listener.on_step(step)
    look(BEFORE_FIRST)
    for row in range(num_layers):
        gate = steps.gate(row)
        for listener in policies.listeners:
            listener.on_gate(gate)
        look(row)
    for listener in policies.listeners:
        (listener.on_step_end if num_layers == 3 else listener.on_step_broken)()
    return said


@pytest.mark.parametrize("name", POLICIES)
def test_a_step_that_broke_off_is_forgotten(name: str) -> None:
    told, untold = _policies(name), _policies(name)
    steps, same_steps, others = Steps(), Steps(), Steps(1)
    for number in range(12):
        for num_layers in {0, 1, 2} if number % 3 == 1 else ():
            _pass(told, others, num_layers)

        for ours, theirs in zip(_pass(told, steps), _pass(untold, same_steps), strict=True):
            np.testing.assert_array_equal(ours, theirs)

    for sequence in (1, 2):
        for policies in (told, untold):
            for listener in policies.listeners:
                listener.on_sequence_end(sequence)
    for part, arrays in ((n, p.to_arrays()) for n, p in told.learned.items()):
        for field, array in untold.learned[part].to_arrays().items():
            np.testing.assert_array_equal(arrays[field], array)
    for ours, theirs in zip(_pass(told, steps), _pass(untold, same_steps), strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), layers=3, num_experts=8)


class Told:
    """A policy that says what it is told to."""

    def __init__(self) -> None:
        self.values = np.zeros(GRID.size, np.float32)
        self.forecast: Forecast | None = None

    def on_use(self, indices: Sequence[int]) -> None:
        """Changes nothing."""

    def scores(self) -> np.ndarray:
        return self.values

    def predict(self, row: int) -> Forecast | None:
        return self.forecast


@pytest.fixture
def told() -> Told:
    return Told()


@pytest.fixture
def store(experts: ExpertFile, told: Told) -> Iterator[ExpertStore]:
    opened = open_store(experts, slots=6, scorer=told)
    yield opened
    opened.close()


def _policy_runner(store: ExpertStore, policies: PolicySet) -> PolicyRunner:
    snapshot = ScoreSnapshot(policies.scorer, GRID.size)
    return PolicyRunner(store, policies, snapshot, CostMeter(load_s=1e-3, layer_s=1e-3), inline=True)


def _spoil(values: np.ndarray | None, value: float) -> None:
    if values is not None:
        values[1, ::2] = value


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("name", POLICIES)
def test_signals_that_are_not_finite_reach_no_policy(store: ExpertStore, name: str, value: float) -> None:
    """However they come about: what is learned is finite, and the search goes on."""
    policies, steps = _policies(name), Steps()
    policy_runner = _policy_runner(store, policies)
    for number in range(12):
        step = steps.step()
        if number == 4:
            _spoil(step.embeddings, value)
        policy_runner.begin_step(lambda step=step: step)
        for row in range(3):
            gate = steps.gate(row)
            if number == 5:
                _spoil(gate.probs, value)
            if number == 6:
                _spoil(gate.ahead, value)
            policy_runner.post_gates(lambda gate=gate: [gate], TIMES)
            assert np.isfinite(policies.scorer.scores()).all()
        policy_runner.end_step(1e-3)
    for sequence in (1, 2):
        policy_runner.end_sequence(sequence)

    assert policy_runner.problem is None
    assert policy_runner.num_unsound == 0
    learned = [array for part in policies.learned.values() for array in part.to_arrays().values()]
    assert all(np.isfinite(array).all() for array in learned)


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("field", ["priority", "probability"])
def test_a_forecast_that_is_not_finite_is_left_out_and_the_next_one_is_not(
    store: ExpertStore, told: Told, value: float, field: str
) -> None:
    policy_runner = _policy_runner(store, PolicySet(told, told, ()))
    steps = Steps()
    bad, good = np.full((3, 8), 0.5, np.float32), np.zeros((3, 8), np.float32)
    bad[1, 3], good[2, 7] = value, 0.9
    fine = np.full((3, 8), 0.5, np.float32)
    for priority, probability in ((bad, fine) if field == "priority" else (fine, bad), (good, good)):
        told.forecast = Forecast(priority, probability)
        policy_runner.begin_step(steps.step)
        for row in range(3):
            policy_runner.post_gates(lambda row=row: [steps.gate(row)], TIMES)
        policy_runner.end_step(1e-3)

    assert policy_runner.problem is None
    assert policy_runner.num_unsound == 4
    assert store.wait_idle(10)
    assert np.flatnonzero(store.resident(2)).tolist() == [7], "of the bad one nothing was fetched"


@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["all", "absent", "resident", "one"])
def test_scores_that_are_not_finite_evict_nobody_who_is_not_there(
    store: ExpertStore, told: Told, value: float, where: str
) -> None:
    """Every expert is asked for again and again, and comes: no slot is lost, and none is given out twice."""
    random = np.random.default_rng(0)
    for number in range(60):
        resident = np.concatenate([store.resident(layer) for layer in GRID.layers])
        told.values = np.zeros(GRID.size, np.float32)
        if number > 3:
            spoilt = {"all": resident | True, "absent": ~resident, "resident": resident}.get(where)
            told.values[np.flatnonzero(spoilt) if spoilt is not None else random.integers(GRID.size)] = value
        layer, wanted = int(random.integers(3)), sorted(random.choice(8, 4, replace=False).tolist())

        got = [expert for group in store.acquire(layer, wanted) for expert, _ in group]

        assert sorted(got) == wanted
        assert store.num_resident <= store.num_slots
    assert store.num_resident == store.num_slots
