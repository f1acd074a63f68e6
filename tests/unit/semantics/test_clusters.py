"""Clusters of prompts: balanced, deterministic, found again after a restart, and statistics that move with them."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cluster.semantics.clusters import MAX_SHARE, Clusters, balanced_assignment
from cluster.semantics.statistics import ExpertStatistics, no_statistics

DIMS = 16


def _prompts(topics: list[int], seed: int, noise: float = 0.4) -> list[bytes]:
    """A prompt of each topic given: near the topic's direction."""
    centres = np.random.default_rng(0).standard_normal((64, DIMS))
    rng = np.random.default_rng(seed)
    vectors = centres[topics] + noise * rng.standard_normal((len(topics), DIMS))
    vectors *= 127 / np.linalg.norm(vectors, axis=1, keepdims=True)
    return [vector.astype(np.int8).tobytes() for vector in np.rint(vectors)]


def _fitted(topics: list[int], max_clusters: int, seed: int = 1) -> Clusters:
    clusters = Clusters(max_clusters)
    clusters.observe(_prompts(topics, seed))
    clusters.fit()
    return clusters


def test_topics_are_found() -> None:
    clusters = _fitted([0, 1, 2, 3] * 40, 4)

    assert clusters.version == 1 and clusters.centroids.shape == (4, DIMS)
    np.testing.assert_allclose(np.linalg.norm(clusters.centroids, axis=1), 1, rtol=1e-5)
    found = [[clusters.assign(prompt) for prompt in _prompts([topic] * 30, seed=2)] for topic in range(4)]
    commonest = [max(set(of_topic), key=of_topic.count) for of_topic in found]
    assert len(set(commonest)) == 4
    assert all(of_topic.count(common) >= 28 for of_topic, common in zip(found, commonest, strict=True))


@settings(max_examples=60, deadline=None)
@given(num_points=st.integers(1, 60), num_clusters=st.integers(1, 8), seed=st.integers(0, 2**31))
def test_no_cluster_gets_more_than_its_capacity(num_points: int, num_clusters: int, seed: int) -> None:
    likeness = np.random.default_rng(seed).standard_normal((num_points, num_clusters)).astype(np.float32)
    capacity = -(-num_points // num_clusters)

    chosen = balanced_assignment(likeness, capacity)

    assert chosen.min() >= 0
    assert np.bincount(chosen, minlength=num_clusters).max() <= capacity
    free = balanced_assignment(likeness, num_points)
    np.testing.assert_array_equal(free, likeness.argmax(axis=1))


def test_a_topic_that_dominates_is_split() -> None:
    """200 of 260 prompts: without balance three of four clusters would share the rest."""
    clusters = _fitted([0] * 200 + [1, 2, 3] * 20, 4)
    members = [clusters.assign(prompt) for prompt in _prompts([0] * 200, seed=1)]
    assert max(members.count(cluster) for cluster in set(members)) <= 2 * MAX_SHARE * 260 / 4


@settings(max_examples=25, deadline=None)
@given(topics=st.lists(st.integers(0, 5), min_size=4, max_size=80), num=st.integers(1, 12))
def test_fitting_is_deterministic_and_finite_for_any_prompts(topics: list[int], num: int) -> None:
    first, second = _fitted(topics, num), _fitted(topics, num)

    assert first.version == second.version
    np.testing.assert_array_equal(first.centroids, second.centroids)
    assert np.isfinite(first.centroids).all() and len(first.centroids) <= num
    for prompt in _prompts(topics, seed=3):
        assert -1 <= first.assign(prompt) < max(len(first.centroids), 1)


def test_equal_prompts_do_not_break_it() -> None:
    clusters = Clusters(4)
    clusters.observe(_prompts([0], seed=0) * 64)
    assert clusters.fit() == 1
    assert np.isfinite(clusters.centroids).all()


def test_few_prompts_make_few_clusters_and_more_come_with_them() -> None:
    clusters = Clusters(8)
    assert clusters.fit() == 0 and clusters.assign(_prompts([0], 0)[0]) == -1
    sizes: list[int] = []
    for num in (8, 20, 40, 200, 200):
        clusters.observe(_prompts([i % 8 for i in range(num)], seed=num))
        clusters.fit()
        sizes.append(len(clusters.centroids))
    assert sizes == [0, 2, 5, 8, 8]
    assert clusters.version == 3


def test_like_prompts_change_nothing_and_unlike_ones_do() -> None:
    clusters = _fitted([0, 1, 2, 3] * 60, 4)
    for seed in (5, 6, 7):
        clusters.observe(_prompts([0, 1, 2, 3] * 60, seed=seed))
        assert clusters.fit() == 1, "more of the same"
    clusters.observe(_prompts([0, 1, 7, 8] * 60, seed=8))
    assert clusters.fit() == 2, "two topics have come for two"
    assert len({clusters.assign(prompt) for prompt in _prompts([0, 1, 7, 8], seed=9, noise=0.1)}) == 4


def test_statistics_go_where_the_prompts_went() -> None:
    clusters = _fitted([0, 1] * 8, 4)
    assert len(clusters.centroids) == 2
    old = [clusters.assign(prompt) for prompt in _prompts([0, 1], seed=3, noise=0.1)]
    before = _statistics(clusters, {old[0]: 10.0, old[1]: 20.0}, none=5.0)
    clusters.observe(_prompts([0, 1, 2, 3] * 40, seed=4))
    assert clusters.fit() == 2

    after = clusters.carry_over(before)

    assert after.clusters_version == 2 and after.num_clusters == 4
    assert after.values.sum() == pytest.approx(before.values.sum()), "nothing is lost"
    new = [clusters.assign(prompt) for prompt in _prompts([0, 1], seed=5, noise=0.1)]
    shares = after.values[:, 0, 0, 0, 0]
    assert shares[new[0]] > 4 and shares[new[1]] > 8 and shares[-1] == 5, "to others what their prompts took along"
    with pytest.raises(ValueError, match="version 7"):
        clusters.carry_over(no_statistics(7, 2, (0,), 2))


def test_without_earlier_clusters_everything_stays_with_no_cluster() -> None:
    clusters = _fitted([0, 1] * 40, 2)
    before = no_statistics(0, 0, (0,), 2)
    before.values[:] = 3.0
    after = clusters.carry_over(before)
    assert (after.values[-1] == 3).all() and not after.values[:-1].any()


def test_a_restarted_scheduler_goes_on_with_the_same_clusters() -> None:
    clusters = _fitted([0, 1, 2, 3] * 60, 4)

    again = Clusters.from_bytes(clusters.to_bytes(), 4)

    assert again.version == clusters.version
    np.testing.assert_array_equal(again.centroids, clusters.centroids)
    again.observe(_prompts([0, 1, 2, 3] * 60, seed=5))
    assert again.fit() == clusters.version
    with pytest.raises((ValueError, OSError, KeyError)):
        Clusters.from_bytes(b"something else", 4)


def test_versions_go_on_where_clusters_were_lost() -> None:
    clusters = Clusters(4, version=7)
    clusters.observe(_prompts([0, 1] * 20, seed=0))
    assert clusters.fit() == 8


def _statistics(clusters: Clusters, by_cluster: dict[int, float], none: float) -> ExpertStatistics:
    statistics = no_statistics(clusters.version, len(clusters.centroids), (0,), 2)
    for cluster, value in by_cluster.items():
        statistics.values[cluster, 0, 0, 0, 0] = value
    statistics.values[-1, 0, 0, 0, 0] = none
    return statistics


def test_embeddings_of_another_size_begin_anew_and_counts_go_to_no_cluster() -> None:
    clusters = _fitted([0, 1] * 40, 2)
    before = _statistics(clusters, {0: 10.0, 1: 20.0}, none=5.0)
    clusters.observe([prompt[: DIMS // 2] for prompt in _prompts([0, 1] * 40, seed=2)])

    assert clusters.fit() == 2 and clusters.centroids.shape == (2, DIMS // 2)
    assert clusters.carry_over(before).values[:, 0, 0, 0, 0].tolist() == [0, 0, 35]


def test_a_lower_bound_of_clusters_is_obeyed_after_a_restart() -> None:
    many = _fitted([0, 1, 2, 3] * 40, 4)
    few = Clusters.from_bytes(many.to_bytes(), 2)
    few.observe(_prompts([0, 1, 2, 3] * 40, seed=2))
    assert few.fit() == 2 and len(few.centroids) == 2
    carried = few.carry_over(_statistics(many, dict.fromkeys(range(4), 10.0), none=0.0))
    assert carried.values.sum() == pytest.approx(40) and carried.values[-1].sum() == 0
