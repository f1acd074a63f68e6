"""P(expert | prompt): finite, sums to the experts per token, shrunk to the global use; and bits."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra import numpy as hnp

from cluster.semantics.clusters import Clusters
from cluster.semantics.expectation import expected_uses, make_knowledge, mutual_information
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, DECODE, PREFILL, ExpertStatistics, no_statistics

LAYERS, TOP_K = (0, 3), 2
DECODED = 400.0  # tokens behind each planted cluster


def _clusters(num: int, dims: int = 8) -> Clusters:
    clusters = Clusters(num, version=1)
    clusters.centroids = np.eye(num, dims, dtype=np.float32)
    return clusters


def _statistics(counts_CLE: np.ndarray) -> ExpertStatistics:
    statistics = no_statistics(1, len(counts_CLE) - 1, LAYERS, counts_CLE.shape[2])
    statistics.values[:, DECODE, :, :, COUNT] = counts_CLE
    return statistics


def _knowledge(counts_CLE: np.ndarray) -> Knowledge:
    return make_knowledge(_statistics(counts_CLE), _clusters(len(counts_CLE) - 1), version=5, top_k=TOP_K)


def _planted(num_clusters: int = 4, num_experts: int = 16, seed: int = 0, *, same: bool = False) -> np.ndarray:
    """Counts [C, L, E] of tokens that choose 2 experts by shares of their cluster, or all by the same shares."""
    rng = np.random.default_rng(seed)
    shares = rng.dirichlet(np.full(num_experts, 0.3), (num_clusters, len(LAYERS)))
    if same:
        shares[:] = shares[0]
    counts = np.zeros((num_clusters + 1, len(LAYERS), num_experts))
    for cluster in range(num_clusters):
        for layer in range(len(LAYERS)):
            counts[cluster, layer] = rng.multinomial(int(DECODED * TOP_K), shares[cluster, layer])
    return counts


def _embedding(cluster: int, dims: int = 8) -> bytes:
    vector = np.zeros(dims, dtype=np.int8)
    vector[cluster] = 127
    return vector.tobytes()


counts_of = hnp.arrays(np.float64, (4, 2, 6), elements=st.floats(0, 1e7, allow_subnormal=False))


@settings(max_examples=80, deadline=None)
@given(counts=counts_of)
def test_uses_are_finite_and_sum_to_the_experts_per_token(counts: np.ndarray) -> None:
    knowledge = _knowledge(counts)

    for uses in (knowledge.uses, knowledge.prior[None]):
        assert np.isfinite(uses).all() and (uses >= 0).all()
        np.testing.assert_allclose(uses.sum(axis=2), TOP_K, rtol=1e-4)
    assert np.isfinite(knowledge.mutual_information) and knowledge.mutual_information >= 0
    assert knowledge.version == 5 and knowledge.clusters_version == 1
    uses = expected_uses(knowledge, _embedding(1))
    np.testing.assert_allclose(uses.sum(axis=1), TOP_K, rtol=1e-4)


@settings(max_examples=40, deadline=None)
@given(counts=counts_of, seed=st.integers(0, 2**31))
def test_renumbering_experts_renumbers_what_is_expected(counts: np.ndarray, seed: int) -> None:
    order = np.random.default_rng(seed).permutation(counts.shape[2])

    plain, renumbered = _knowledge(counts), _knowledge(counts[:, :, order])

    np.testing.assert_allclose(renumbered.uses, plain.uses[:, :, order], rtol=1e-4, atol=1e-6)
    assert renumbered.mutual_information == pytest.approx(plain.mutual_information, abs=1e-6)


def test_without_support_a_cluster_uses_what_all_do() -> None:
    counts = _planted()
    counts[2] = 0

    knowledge = _knowledge(counts)

    np.testing.assert_allclose(knowledge.uses[2], knowledge.prior, rtol=1e-5)
    assert knowledge.support.tolist() == pytest.approx([DECODED, DECODED, 0, DECODED])


def test_nothing_counted_is_even_use_of_all() -> None:
    knowledge = _knowledge(np.zeros((3, 2, 4)))
    np.testing.assert_allclose(knowledge.uses, TOP_K / 4)
    assert knowledge.mutual_information == 0


def test_more_support_brings_a_cluster_nearer_to_its_own_use() -> None:
    counts = _planted()
    own = counts[0, 0] / counts[0, 0].sum() * TOP_K
    distances: list[float] = []
    for scale in (0.003, 0.03, 1.0):
        scaled = counts.copy()
        scaled[0] *= scale
        distances.append(float(np.abs(_knowledge(scaled).uses[0, 0] - own).sum()))
    assert distances[0] > distances[1] > distances[2]
    assert distances[2] < 0.1 * TOP_K


def test_clusters_that_differ_by_chance_alone_are_taken_for_one() -> None:
    knowledge = _knowledge(_planted(same=True))
    apart = np.abs(knowledge.uses - knowledge.prior).sum(axis=2).mean()
    assert apart < 0.02 * TOP_K, "independent routing must look the same everywhere"


def test_information_is_none_of_independent_and_all_of_planted() -> None:
    assert mutual_information(_planted(8, same=True)[:-1]) < 0.01
    assert mutual_information(_planted(8, seed=3)[:-1]) > 0.3
    disjoint = np.zeros((4, 1, 8))
    for cluster in range(4):
        disjoint[cluster, 0, 2 * cluster : 2 * cluster + 2] = 1e5
    assert mutual_information(disjoint) == pytest.approx(2.0, abs=1e-3), "which of four: two bits"
    assert mutual_information(np.zeros((4, 2, 8))) == 0
    assert mutual_information(np.zeros((0, 2, 8))) == 0


def test_plain_estimate_without_the_correction_would_see_what_is_not_there() -> None:
    """The null case has to be small because of the correction, not because the sample is large."""
    few = np.stack([np.random.default_rng(i).multinomial(60, np.full(32, 1 / 32)) for i in range(8)])[:, None]
    total, rows, columns = few.sum(), few.sum(axis=2, keepdims=True), few.sum(axis=0, keepdims=True)
    with np.errstate(divide="ignore", invalid="ignore"):
        plain = np.nansum(few / total * np.log2(few * total / (rows * columns)))
    assert plain > 0.25
    assert mutual_information(few.astype(float)) < 0.25 * plain


def test_prefill_does_not_count_and_prompts_of_no_cluster_count_for_all() -> None:
    statistics = _statistics(np.zeros((3, 2, 4)))
    statistics.values[0, PREFILL, :, 0, COUNT] = 1e6
    statistics.values[-1, DECODE, :, 3, COUNT] = 1e6
    knowledge = make_knowledge(statistics, _clusters(2), version=1, top_k=1)
    assert knowledge.prior[0].tolist() == pytest.approx([0, 0, 0, 1], abs=1e-4)
    np.testing.assert_allclose(knowledge.uses[0], knowledge.prior, rtol=1e-5)


def test_a_prompt_uses_what_its_nearest_clusters_do() -> None:
    knowledge = _knowledge(_planted())
    between = np.zeros(8, dtype=np.int8)
    between[:2] = 90

    np.testing.assert_allclose(expected_uses(knowledge, _embedding(1)), knowledge.uses[1], atol=1e-3)
    middle = expected_uses(knowledge, between.tobytes())
    np.testing.assert_allclose(middle, (knowledge.uses[0] + knowledge.uses[1]) / 2, atol=1e-2)


@pytest.mark.parametrize("embedding", [b"", b"\0" * 8, b"abc"])
def test_a_prompt_of_which_nothing_is_known_uses_what_all_do(embedding: bytes) -> None:
    knowledge = _knowledge(_planted())
    np.testing.assert_array_equal(expected_uses(knowledge, embedding), knowledge.prior)


def test_statistics_of_other_clusters_are_refused() -> None:
    with pytest.raises(ValueError, match="version 9"):
        make_knowledge(no_statistics(9, 2, LAYERS, 4), _clusters(2), version=1, top_k=1)
