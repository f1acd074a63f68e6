"""fMoE's store and search against their published rules."""

from __future__ import annotations

import hypothesis.extra.numpy as hnp
import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from trace_builders import DIM, clustered_trace

from cluster.errors import ConfigError
from cluster.policies.expert_maps.search import MapSearch, select_experts
from cluster.policies.expert_maps.store import MapStore
from cluster.policies.prefetch.fmoe import FmoePredictor
from cluster.policies.signals import Grid
from cluster.replay.schedule import build_steps, grid_of
from cluster.replay.sweep import show

GRID = Grid((0, 1, 2), 4, 2)


def _store(capacity: int = 4, *, distance: int = 1) -> MapStore:
    return MapStore(GRID, dim=2, capacity=capacity, distance=distance)


def _map(rng: np.random.Generator) -> np.ndarray:
    return rng.dirichlet(np.ones(4), size=3).astype(np.float32)


@settings(max_examples=40, deadline=None)
@given(
    probs=hnp.arrays(np.float32, (2, 6), elements=st.floats(0, 1, width=32)),
    scores=hnp.arrays(np.float64, 2, elements=st.floats(-1, 1)),
    top_k=st.integers(1, 6),
)
def test_delta_rule_takes_the_shortest_prefix_that_reaches_delta_and_k(
    probs: np.ndarray, scores: np.ndarray, top_k: int
) -> None:
    selected = select_experts(probs, scores, top_k)

    for row, score, chosen in zip(probs, scores, selected, strict=True):
        delta = min(max(1 - score, 0), 1)
        order = sorted(range(6), key=lambda e: -row[e])
        count = next((n for n in range(1, 7) if sum(float(row[e]) for e in order[:n]) >= delta and n >= top_k), 6)
        assert set(np.flatnonzero(chosen)) == set(order[:count])


def test_perfect_match_fetches_exactly_k() -> None:
    assert select_experts(np.array([[0.1, 0.2, 0.3, 0.4]]), np.array([1.0]), 2).tolist() == [[False, False, True, True]]


def test_trajectory_cosine_equals_that_of_the_flattened_prefix() -> None:
    rng = np.random.default_rng(0)
    store, maps = _store(), [_map(rng) for _ in range(3)]
    store.insert(rng.standard_normal((3, 2)), np.stack(maps))
    observed = np.stack([_map(rng) for _ in range(2)])

    match = store.begin_match(2)
    for row in range(3):
        cosine = store.observe(match, observed[:, row])
        for i, j in np.ndindex(2, 3):
            a, b = observed[i, : row + 1].ravel(), maps[j][: row + 1].ravel()
            assert cosine[i, j] == pytest.approx(a @ b / np.linalg.norm(a) / np.linalg.norm(b), abs=1e-5)


def test_full_store_overwrites_the_most_redundant_entry() -> None:
    rng = np.random.default_rng(1)
    store = _store(capacity=3, distance=1)
    embeddings, maps = rng.standard_normal((3, 2)), np.stack([_map(rng) for _ in range(3)])
    store.insert(embeddings, maps)

    store.insert(embeddings[1:2] * 2, maps[1:2] * 0.99)

    assert store.size == 3
    cosine = store.match_embeddings(embeddings)
    assert cosine.max(axis=1) == pytest.approx(1, abs=1e-5)
    np.testing.assert_allclose(store.rows(np.arange(3), 0), [maps[0, 0], maps[1, 0] * 0.99, maps[2, 0]], rtol=1e-6)


def test_entries_of_one_call_never_share_a_slot() -> None:
    rng = np.random.default_rng(2)
    store = _store(capacity=3)
    store.insert(rng.standard_normal((3, 2)), np.stack([_map(rng) for _ in range(3)]))
    twins = np.repeat(_map(rng)[None], 2, axis=0)

    store.insert(np.ones((2, 2)), twins)

    rows = store.rows(np.arange(3), 1)
    assert sum(np.allclose(row, twins[0, 1]) for row in rows) == 2


def test_zero_rows_never_match_and_zero_maps_are_not_stored() -> None:
    store = _store(capacity=4)
    store.insert(np.array([[-1.0, 0.0]]), np.full((1, 3, 4), 0.25))
    store.insert(np.ones((1, 2)), np.zeros((1, 3, 4)))

    assert store.size == 1
    assert store.match_embeddings(np.array([[1.0, 0.0]])).tolist() == [[-1.0]]


def test_search_redundancy_equals_the_stores_own() -> None:
    trace = clustered_trace(num_requests=2, num_rows=20, seed=3)
    grid = grid_of(trace)
    stores = [MapStore(grid, dim=DIM, capacity=5) for _ in range(2)]
    for step in build_steps(trace, concurrency=2, order=[0, 1]):
        show(step, [MapSearch(stores[0])])
        stores[1].insert(step.signal.embeddings, np.stack([g.probs for g in step.gates], axis=1))

    for row in range(grid.num_layers):
        np.testing.assert_allclose(*(store.rows(np.arange(5), row) for store in stores), rtol=1e-5)


def test_arrays_give_back_the_entries() -> None:
    rng = np.random.default_rng(4)
    store, fresh = _store(), _store()
    store.insert(rng.standard_normal((2, 2)), np.stack([_map(rng) for _ in range(2)]))
    arrays = store.to_arrays()
    store.insert(np.ones((1, 2)), _map(rng)[None])

    fresh.load_arrays(arrays)

    assert fresh.size == 2 and fresh.to_arrays().keys() == arrays.keys()
    for name, array in fresh.to_arrays().items():
        np.testing.assert_array_equal(array, arrays[name])


@pytest.mark.parametrize("order", [(0, 0, 1), (1, 0, 0)])
def test_more_entries_than_fit_replace_the_most_redundant(order: tuple[int, ...]) -> None:
    rng = np.random.default_rng(5)
    large, small = _store(capacity=3), _store(capacity=2)
    maps = np.stack([_map(rng) for _ in range(2)])
    large.insert(np.eye(2)[list(order)], maps[list(order)])

    small.load_arrays(large.to_arrays())

    kept = small.to_arrays()
    assert int(kept["num_learned"]) == 3
    assert sorted(kept["maps"][:, 0, 0].tolist()) == sorted(maps[:, 0, 0].tolist())


@pytest.mark.parametrize(
    ("arrays", "said"),
    [
        ({"maps": np.zeros((1, 3, 4))}, "without embeddings, num_learned"),
        ({"maps": np.zeros((1, 3, 5)), "embeddings": np.zeros((1, 2)), "num_learned": np.array(1)}, r"3, 5.*n, 3, 4"),
        ({"maps": np.zeros((1, 3, 4)), "embeddings": np.zeros((2, 2)), "num_learned": np.array(1)}, r"\(2, 2\)"),
    ],
)
def test_arrays_of_another_model_are_refused(arrays: dict[str, np.ndarray], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        _store().load_arrays(arrays)


def test_entries_that_come_during_a_step_are_matched_from_the_next_on() -> None:
    rng = np.random.default_rng(6)
    store = _store(capacity=4)
    store.insert(rng.standard_normal((1, 2)), _map(rng)[None])
    observed, match = _map(rng)[None], store.begin_match(1)
    store.observe(match, observed[:, 0])

    store.insert(np.ones((1, 2)), observed)

    assert store.observe(match, observed[:, 1]).shape == (1, 1)
    assert store.observe(store.begin_match(1), observed[:, 0])[0, 1] == pytest.approx(1, abs=1e-5)


def _recall(clusters: int) -> float:
    """Share of the experts used that are among as many fetched by fMoE with the store of another trace."""
    past = clustered_trace(num_requests=4, num_rows=40, clusters=clusters, seed=10)
    trace = clustered_trace(num_requests=4, num_rows=40, clusters=clusters, seed=11)
    grid = grid_of(trace)
    store = MapStore(grid, dim=DIM, capacity=100, distance=2)
    for step in build_steps(past, concurrency=1, order=range(4)):
        store.insert(step.signal.embeddings, np.stack([g.probs for g in step.gates], axis=1))
    search, found, wanted = MapSearch(store, learn=False), 0, 0
    predictor = FmoePredictor(grid, search)
    for step in build_steps(trace, concurrency=1, order=range(4)):
        search.on_step(step.signal)
        for gate in step.gates:
            forecast = predictor.predict(gate.row - 1)
            assert forecast is not None
            best = np.argsort(-forecast.priority[gate.row])[: grid.top_k]
            found += len(set(best.tolist()) & set(step.needed[gate.row]))
            wanted += len(step.needed[gate.row])
            search.on_gate(gate)
        search.on_step_end()
        assert search.is_idle and not len(search.plan)
    return found / wanted


def test_search_finds_planted_clusters() -> None:
    assert _recall(clusters=4) > 0.85


def test_search_finds_nothing_where_gates_are_independent() -> None:
    assert _recall(clusters=0) == pytest.approx(2 / 16, abs=0.04)
