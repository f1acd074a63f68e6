"""The policy runner: signals reach the policies in order and forecasts the memory; when late, steps are left out."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence

import numpy as np
import pytest
from expert_builders import ExpertFile, open_store, write_experts

from actors.experts.memory.store import ExpertStore
from actors.experts.policy_runner import LayerTimes, PolicyRunner
from cluster.policies.base import PolicySet
from cluster.policies.eviction.score_snapshot import ScoreSnapshot
from cluster.policies.prefetch.base import Forecast
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.signals import GateSignal, StepSignal

NUM_EXPERTS, LAYERS = 6, 2
SIZE = NUM_EXPERTS * LAYERS
TIMES = LayerTimes(1e-3, 0.0, 1e-3)


class Scripted:
    """A policy that says what it is told to, and notes what it hears."""

    def __init__(self) -> None:
        self.heard: list[str] = []
        self.values = np.arange(SIZE, dtype=np.float64)
        self.probability = np.zeros((LAYERS, NUM_EXPERTS), dtype=np.float32)
        self.expects = True
        self.pause = threading.Event()
        self.pause.set()

    def on_use(self, indices: Sequence[int]) -> None:
        self.heard += [f"use {index}" for index in indices]

    def scores(self) -> np.ndarray:
        return self.values

    def predict(self, row: int) -> Forecast | None:
        return Forecast(self.probability, self.probability) if self.expects else None

    def on_step(self, step: StepSignal) -> None:
        assert self.pause.wait(10)
        self.heard.append("step")

    def on_gate(self, gate: GateSignal) -> None:
        self.heard.append(f"gate {gate.row}")

    def on_step_end(self) -> None:
        self.heard.append("end")

    def on_sequence_end(self, sequence: int) -> None:
        self.heard.append(f"over {sequence}")


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), layers=LAYERS, num_experts=NUM_EXPERTS)


@pytest.fixture
def policy() -> Scripted:
    return Scripted()


@pytest.fixture
def store(experts: ExpertFile, policy: Scripted) -> Iterator[ExpertStore]:
    opened = open_store(experts, slots=3, scorer=ScoreSnapshot(policy, SIZE))
    yield opened
    opened.close()


def _policy_runner(store: ExpertStore, policy: Scripted, *, inline: bool) -> PolicyRunner:
    snapshot = store._device.residents.order._scorer
    assert isinstance(snapshot, ScoreSnapshot)
    policies = PolicySet(policy, policy, (policy,))
    return PolicyRunner(store, policies, snapshot, CostMeter(load_s=1e-3, layer_s=1e-3), inline=inline)


def _step(num_rows: int = 1) -> StepSignal:
    return StepSignal((7,), np.ones((1, 4), np.float32), np.array([num_rows]), np.array([num_rows == 1]))


def _gate(row: int, *used: int) -> GateSignal:
    counts = np.zeros((1, NUM_EXPERTS), np.float32)
    counts[0, list(used)] = 1
    return GateSignal(row, np.full((1, NUM_EXPERTS), 1 / NUM_EXPERTS, np.float32), counts, None)


def _run(policy_runner: PolicyRunner, *, num_rows: int = 1) -> None:
    policy_runner.begin_step(lambda: _step(num_rows))
    policy_runner.post_gates(lambda: [_gate(0, 1)], TIMES)
    policy_runner.post_gates(lambda: [_gate(1, 2)], TIMES)
    policy_runner.end_step(1e-3)


@pytest.mark.parametrize("inline", [True, False])
def test_signals_come_in_order_and_forecasts_are_fetched(store: ExpertStore, policy: Scripted, inline: bool) -> None:
    policy_runner = _policy_runner(store, policy, inline=inline)
    policy.probability[1, 4] = 0.95

    _run(policy_runner)
    policy_runner.end_sequence(7)
    policy_runner.close()

    assert [what for what in policy.heard if "use" not in what] == ["step", "gate 0", "gate 1", "end", "over 7"]
    assert store.wait_idle(10)
    assert np.flatnonzero(store.resident(1)).tolist() == [4]
    assert store._device.residents.order.scores().tolist() == policy.values.tolist(), "published"
    assert store._device.residents.order.scores() is not policy.values, "a copy"


def test_forecasts_are_checked_against_what_the_gates_chose(store: ExpertStore, policy: Scripted) -> None:
    policy_runner = _policy_runner(store, policy, inline=True)
    policy.probability[:] = 0.05
    policy.probability[0, 1] = policy.probability[1, 3] = 0.95

    _run(policy_runner)

    counters = store.counters
    assert counters.num_forecasts.tolist() == [10, 0, 0, 0, 0, 0, 0, 0, 0, 2]
    assert counters.came_true.tolist() == [1, 0, 0, 0, 0, 0, 0, 0, 0, 1]
    assert counters.predicted[[0, 9]] == pytest.approx([0.5, 1.9])


def test_layers_are_heard_one_by_one_only_while_something_is_fetched_ahead(
    store: ExpertStore, policy: Scripted
) -> None:
    policy_runner = _policy_runner(store, policy, inline=True)
    strides = [policy_runner.stride]
    for expects in (True, False, True):
        policy.expects = expects
        _run(policy_runner)
        strides.append(policy_runner.stride)

    assert strides[:2] == [1, 1] and strides[2] > 1 and strides[3] == 1


def test_layers_are_heard_one_by_one_while_steps_wait_more_than_they_compute(
    store: ExpertStore, policy: Scripted
) -> None:
    policy_runner = _policy_runner(store, policy, inline=True)
    policy.expects = False
    strides: list[int] = []
    for took_s in (1.5e-3, 4e-3):
        policy_runner.begin_step(_step)
        for row in range(LAYERS):
            policy_runner.post_gates(lambda row=row: [_gate(row, 1)], LayerTimes(1e-3, 0.0, took_s))
        policy_runner.end_step(1e-3)
        strides.append(policy_runner.stride)

    assert strides[0] > 1 and strides[1] == 1


def test_large_steps_go_round_the_ring_instead(store: ExpertStore, policy: Scripted) -> None:
    policy_runner = _policy_runner(store, policy, inline=True)

    policy_runner.begin_step(lambda: _step(64))
    policy_runner.post_gates(lambda: [_gate(0, *range(NUM_EXPERTS))], TIMES)

    scores = store._device.residents.order.scores()
    assert scores[np.argsort(policy.values)[-1]] == scores.max(), "what is worth most is pinned"
    assert scores[0] == scores.min(), "of the layer that has passed"
    assert store.wait_idle(10)
    assert store.resident(1).any(), "the next layer comes ahead"


def test_ring_on_a_busy_link_fetches_nothing_that_may_not_be_used(
    store: ExpertStore, policy: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Half of a layer is used: on a link that is always busy the other half would cost time, on an idle one none."""
    monkeypatch.setattr(store, "load_s", lambda: 1e-3)
    monkeypatch.setattr(store, "load_cpu_s", lambda: 1e-4)
    assert not store.loads_give_way, "as from a disk"
    policy_runner = _policy_runner(store, policy, inline=True)
    wanted: dict[str, bool] = {}
    for name, times in (("busy", LayerTimes(1e-5, 1.0, 1.0)), ("idle", LayerTimes(1.0, 0.0, 1.0))):
        for _ in range(100):
            policy_runner.begin_step(lambda: _step(64))
            policy_runner.post_gates(lambda: [_gate(0, *range(NUM_EXPERTS // 2))], times)
            wanted[name] = store._device.priority is not None
            policy_runner.end_step(1e-3)

    assert wanted == {"busy": False, "idle": True}


def test_steps_are_left_out_while_search_is_behind(store: ExpertStore, policy: Scripted) -> None:
    policy_runner = _policy_runner(store, policy, inline=False)
    policy.pause.clear()
    assert not policy_runner.is_behind

    for _ in range(2):
        _run(policy_runner)
    assert policy_runner.is_behind

    policy.pause.set()
    policy_runner.close()
    assert not policy_runner.is_behind
    assert policy.heard.count("step") == 2


def test_answers_are_made_between_signals(store: ExpertStore, policy: Scripted) -> None:
    policy_runner = _policy_runner(store, policy, inline=False)
    _run(policy_runner)

    answer = policy_runner.ask(lambda: {"heard": {"n": np.array([len(policy.heard)])}}, 10)

    assert answer["heard"]["n"].tolist() == [4]
    policy.pause.clear()
    policy_runner.begin_step(_step)
    with pytest.raises(TimeoutError):
        policy_runner.ask(dict, 0.01)
    policy.pause.set()
    policy_runner.close()


def test_a_search_that_fails_leaves_the_memory_to_recency_and_says_so(store: ExpertStore, policy: Scripted) -> None:
    policy_runner = _policy_runner(store, policy, inline=False)
    policy.probability[1, 4] = 0.95

    def breaks() -> StepSignal:
        raise ValueError("gates of another world")

    policy_runner.begin_step(breaks)
    policy_runner.post_gates(lambda: [_gate(0, 1)], TIMES)
    assert policy_runner.ask(dict, 10) == {}, "questions are still answered"
    policy_runner.close()

    assert policy_runner.problem is not None
    assert "gates of another world" in policy_runner.problem
    assert policy.heard == [], "what came after it is void"
    assert policy_runner.is_behind, "no more steps are handed over"
    assert not store._device.residents.order.scores().any()
    assert store.wait_idle(10)
    assert store.num_resident == 0
    assert sorted(expert for group in store.acquire(0, [0, 5]) for expert, _ in group) == [0, 5]
