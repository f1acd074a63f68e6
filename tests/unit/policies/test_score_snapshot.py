"""Published eviction policies and predictors against their formulas."""

from __future__ import annotations

import numpy as np
import pytest

from cluster.errors import ConfigError
from cluster.policies.build import EVICTIONS, PREDICTIONS, PolicyContext, build_policies
from cluster.policies.eviction.eam import EamScorer
from cluster.policies.eviction.fmoe import FmoeScorer
from cluster.policies.eviction.frequency import LfuScorer
from cluster.policies.eviction.lru import LruPerLayerScorer
from cluster.policies.eviction.mrs import MrsScorer
from cluster.policies.expert_maps.search import MapSearch
from cluster.policies.expert_maps.store import MapStore
from cluster.policies.prefetch.base import BEFORE_FIRST
from cluster.policies.prefetch.eam import EamPredictor
from cluster.policies.prefetch.fmoe import FmoePredictor
from cluster.policies.prefetch.next_gate import NextGatePredictor
from cluster.policies.prefetch.whole_layer import WholeLayerPredictor
from cluster.policies.request_activations import ActivationCollection, ActivationTracker
from cluster.policies.signals import GateSignal, Grid, StepSignal

GRID = Grid((3, 5), 4, 2)


def _step(*sequences: int, decodes: bool = True) -> StepSignal:
    count = len(sequences)
    return StepSignal(sequences, np.ones((count, 2), dtype=np.float32), np.ones(count), np.full(count, decodes))


def _gate(row: int, *probs: list[float], ahead: np.ndarray | None = None) -> GateSignal:
    values = np.array(probs, dtype=np.float32)
    counts = np.zeros_like(values)
    np.put_along_axis(counts, np.argsort(-values, axis=1)[:, :2], 1.0, axis=1)
    return GateSignal(row, values, counts, ahead)


def test_lfu_counts_fade_by_the_step() -> None:
    scorer = LfuScorer(GRID, decay=0.5)
    for _ in range(3):
        scorer.on_use([0])
    for _ in range(100):
        scorer.on_step_end()
    scorer.on_use([1])

    scores = scorer.scores()

    assert scores[0] / scores[1] == pytest.approx(3 * 0.5**100)


def test_mrs_is_a_moving_average_of_the_best_probabilities() -> None:
    scorer = MrsScorer(GRID, alpha=0.25, num_kept=2)

    scorer.on_gate(_gate(1, [0.4, 0.3, 0.2, 0.1], [0.0, 0.5, 0.1, 0.4]))
    scorer.on_gate(_gate(1, [0.1, 0.1, 0.0, 0.8], [0.0, 0.0, 0.4, 0.6]))

    first = np.array([0.4, 0.3 + 0.5, 0, 0.4]) / 2
    second = np.array([0.1, 0.1, 0.4, 0.8 + 0.6]) / 2
    np.testing.assert_allclose(scorer.scores()[4:], 0.25 * second + 0.75 * 0.25 * first, rtol=1e-6)
    assert not scorer.scores()[:4].any()


def test_fmoe_priorities_are_floats() -> None:
    store = MapStore(GRID, dim=2, capacity=2, distance=1)
    store.insert(np.ones((1, 2)), np.array([[[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]], dtype=np.float32))
    search = MapSearch(store)
    scorer = FmoeScorer(GRID, search)
    for index in (0, 0, 0, 0, 1):
        scorer.on_use([index])

    search.on_step(_step(7))

    np.testing.assert_allclose(scorer.scores()[:4], [0.4, 0.2, 0, 0], rtol=1e-6)


def test_fmoe_prefetch_divides_by_the_distance() -> None:
    store = MapStore(GRID, dim=2, capacity=2, distance=2)
    store.insert(np.ones((1, 2)), np.array([[[0.1, 0.2, 0.3, 0.4], [0.7, 0.1, 0.1, 0.1]]], dtype=np.float32))
    search = MapSearch(store)
    search.on_step(_step(7))

    forecast = FmoePredictor(GRID, search).predict(BEFORE_FIRST)

    assert forecast is not None
    np.testing.assert_allclose(forecast.priority, [[0, 0, 0.3, 0.4], [0.35, 0.05, 0, 0]], rtol=1e-6)


def test_activation_collection_replaces_the_matrix_most_like_the_new_one() -> None:
    collection = ActivationCollection(Grid((0,), 3, 1), 2)
    for matrix in ([1.0, 0, 0], [0, 1.0, 0], [0, 2.0, 1.0], [0, 0, 0]):
        collection.insert(np.array(matrix, dtype=np.float32))

    nearest = collection.nearest(np.array([[0, 1, 0], [1, 0, 0]], dtype=np.float32))

    assert nearest is not None
    np.testing.assert_array_equal(nearest, [[0, 2, 1], [1, 0, 0]])


def test_request_is_matched_with_its_like_and_forgotten_at_its_end() -> None:
    tracker = ActivationTracker(GRID)
    left, right = [0.5, 0.4, 0.1, 0], [0, 0.1, 0.4, 0.5]
    for sequence, probs in ((1, left), (2, right)):
        tracker.on_step(_step(sequence))
        for row in range(2):
            tracker.on_gate(_gate(row, probs))
        tracker.on_sequence_end(sequence)
    assert tracker.num_tracked == 0

    tracker.on_step(_step(3))
    tracker.on_gate(_gate(0, left))

    np.testing.assert_allclose(tracker.predicted, [[0.5, 0.5, 0, 0]] * 2)
    scores = EamScorer(GRID, tracker).scores().reshape(2, 4)
    assert scores[0, 0] == pytest.approx(2 * scores[1, 0])
    assert (scores[:, 2:] > 0).all() and (scores[:, 2:] < scores[1, 0]).all()
    forecast = EamPredictor(GRID, tracker).predict(0)
    assert forecast is not None
    np.testing.assert_allclose(forecast.priority, [[0] * 4, [0.25, 0.25, 0, 0]])


def test_eam_scores_follow_what_the_request_does() -> None:
    tracker = ActivationTracker(GRID)
    scorer = EamScorer(GRID, tracker)
    for sequence, probs in ((1, [0.5, 0.4, 0.1, 0]), (2, [0, 0.1, 0.4, 0.5])):
        tracker.on_step(_step(sequence))
        for row in range(2):
            tracker.on_gate(_gate(row, probs))
        tracker.on_sequence_end(sequence)
    tracker.on_step(_step(3))
    undecided = scorer.scores().copy()

    tracker.on_gate(_gate(0, [0, 0.1, 0.4, 0.5]))

    assert undecided[:4] == pytest.approx([0.2501] * 4)
    assert scorer.scores()[:4] == pytest.approx([0.0001, 0.0001, 0.5001, 0.5001])


def test_lru_per_layer_knows_the_gate_before_room_is_made() -> None:
    scorer = LruPerLayerScorer(GRID)

    for probs in ([0.5, 0.4, 0.1, 0], [0, 0.1, 0.4, 0.5]):
        scorer.on_gate(_gate(1, probs))

    scores = scorer.scores()
    assert scores[4:].tolist() == [-4, -3, -2, -1]  # 2 and 3 were chosen last
    assert (scores[:4] == 0).all()


def test_prefill_and_decode_are_matched_apart() -> None:
    tracker = ActivationTracker(GRID)
    tracker.on_step(_step(1, decodes=False))
    tracker.on_gate(_gate(0, [0.5, 0.5, 0, 0]))
    tracker.on_sequence_end(1)

    tracker.on_step(_step(2))

    assert not tracker.predicted.any()


def test_next_gate_fetches_the_best_of_every_sequence() -> None:
    predictor = NextGatePredictor(GRID, num_fetched=1)
    ahead = np.array([[0.1, 0.6, 0.2, 0.1], [0.7, 0.1, 0.1, 0.1]], dtype=np.float32)

    assert predictor.predict(BEFORE_FIRST) is None
    predictor.on_gate(_gate(0, [1.0, 0, 0, 0], [1.0, 0, 0, 0], ahead=ahead))
    forecast = predictor.predict(0)

    assert forecast is not None
    np.testing.assert_allclose(forecast.priority, [[0] * 4, [0.7, 0.6, 0, 0]], rtol=1e-6)
    assert predictor.predict(1) is None


def test_whole_layer_fetches_the_next_layer_only() -> None:
    forecast = WholeLayerPredictor(GRID).predict(0)

    assert forecast is not None
    assert forecast.priority.tolist() == [[0.0] * 4, [1.0] * 4]


@pytest.mark.parametrize("name", [*EVICTIONS, *(f"lru+{prediction}" for prediction in PREDICTIONS)])
def test_every_published_name_is_built_or_says_what_it_needs(name: str) -> None:
    context = PolicyContext(grid=GRID, num_slots=2, embedding_dim=2)
    if name in ("static", "belady", "lru+oracle", "lru+moesaic"):
        with pytest.raises(ConfigError, match="needs"):
            build_policies(name, context)
    else:
        assert build_policies(name, context).scorer.scores().shape == (GRID.size,)


@pytest.mark.parametrize("name", ["fifo", "lru+magic", ""])
def test_unknown_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match="there are"):
        build_policies(name, PolicyContext(grid=GRID, num_slots=2, embedding_dim=2))


def test_eviction_and_prefetch_share_what_they_listen_with() -> None:
    policies = build_policies("fmoe+fmoe", PolicyContext(grid=GRID, num_slots=2, embedding_dim=2))

    assert len(policies.listeners) == 1
