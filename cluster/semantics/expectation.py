"""Which experts a prompt will use: from statistics by cluster to `Knowledge`, and on to P(expert | prompt). Pure.

Only decoded tokens count: the union that a prompt's prefill uses says little of its answer.

Shapes: G clusters, P numbers of an embedding, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import numpy as np

from cluster.semantics.clusters import Clusters
from cluster.semantics.embedding import unit_vector
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import ExpertStatistics

_NUM_NEAREST = 3  # clusters that a prompt is taken for a mixture of
_TEMPERATURE = 0.05  # of the mixture, in mean distances between centroids: prompts of a model may all be much alike
_ACTIVATIONS_PER_OBSERVATION = 4.0  # neighbouring tokens choose alike: so many activations tell as much as one
_MIN_CONCENTRATION, _MAX_CONCENTRATION = 1.0, 1e9
_LEAST_SHARE = 1e-9  # of a layer's counts


def make_knowledge(statistics: ExpertStatistics, clusters: Clusters, *, version: int, top_k: int) -> Knowledge:
    """What the statistics of these clusters say.

    P(expert | cluster) is the posterior mean of a Dirichlet whose mean is the global use; its concentration is
    estimated from the statistics themselves (empirical Bayes): clusters that differ no more than chance would have
    them are shrunk to the global use whatever their support.

    Raises:
        ValueError: statistics of other clusters.
    """
    if statistics.clusters_version != clusters.version or statistics.num_clusters != len(clusters.centroids):
        raise ValueError(
            f"statistics of clusters version {statistics.clusters_version}, not of {clusters.version}: read them again"
        )
    counts_CLE = statistics.decode_counts()
    counts_GLE = counts_CLE[:-1] / _ACTIVATIONS_PER_OBSERVATION
    total_LE = counts_CLE.sum(axis=0) + 0.5  # Jeffreys' prior: what was never seen is not impossible
    share_LE = total_LE / total_LE.sum(axis=1, keepdims=True)
    strength = _concentration(counts_GLE)
    blended = counts_GLE + strength * share_LE
    uses = top_k * blended / blended.sum(axis=2, keepdims=True)
    return Knowledge(
        version=version,
        clusters_version=clusters.version,
        layers=statistics.layers,
        centroids=clusters.centroids,
        uses=uses.astype(np.float32),
        prior=(top_k * share_LE).astype(np.float32),
        support=(counts_CLE[:-1].sum(axis=2).mean(axis=1) / top_k).astype(np.float32),
        mutual_information=mutual_information(counts_GLE),
    )


def expected_uses(knowledge: Knowledge, embedding: bytes) -> np.ndarray:
    """(L, E) float32: the chance that one decoded token of the prompt activates each expert.

    A mixture of the nearest clusters; the global use for a prompt without an embedding, or of another model's size.
    """
    vector = unit_vector(embedding)
    if not len(vector) or knowledge.centroids.shape[:1] == (0,) or knowledge.centroids.shape[1] != len(vector):
        return knowledge.prior
    likeness = knowledge.centroids @ vector
    nearest = np.argsort(-likeness, kind="stable")[:_NUM_NEAREST]
    apart = float(1.0 - (knowledge.centroids @ knowledge.centroids.T).mean())
    weights = np.exp((likeness[nearest] - likeness[nearest[0]]) / max(_TEMPERATURE * apart, 1e-6))
    return np.tensordot((weights / weights.sum()).astype(np.float32), knowledge.uses[nearest], axes=1)


def mutual_information(counts_GLE: np.ndarray) -> float:
    """Bits per layer that the cluster tells of the expert of one activation, mean over layers, at least 0.

    The plug-in estimate less its bias (Miller and Madow 1955: every cell adds 1 / (2 N ln 2) bits of entropy to what
    is found), so that it is about 0 for clusters that tell nothing. Cells are those of every cluster and expert that
    occur, also where the two never met: with few counts most such cells would be met later.
    """
    bits = [_layer_information(counts_GLE[:, layer]) for layer in range(counts_GLE.shape[1])]
    return max(0.0, float(np.mean(bits))) if bits else 0.0


def _layer_information(counts_GE: np.ndarray) -> float:
    total = counts_GE.sum()
    if not total:
        return 0.0
    seen = counts_GE > _LEAST_SHARE * total  # what has faded to almost nothing is gone
    share_GE = np.where(seen, counts_GE / total, 0.0)  # products of tiny counts would be none
    by_cluster, by_expert = share_GE.sum(axis=1, keepdims=True), share_GE.sum(axis=0, keepdims=True)
    ratio = np.divide(share_GE, by_cluster * by_expert, out=np.ones_like(share_GE), where=seen)
    found = float((share_GE * np.log2(ratio)).sum())
    freedom = (np.count_nonzero(by_cluster) - 1) * (np.count_nonzero(by_expert) - 1)
    return found - freedom / (2 * float(total) * np.log(2))


def _concentration(counts_GLE: np.ndarray) -> float:
    """Observations that the global use is worth in each cluster: how alike clusters are, beyond chance.

    With F the share of the variance between clusters (the moments' estimator of Weir and Hill 2002, layers pooled), the
    clusters are draws from a Dirichlet of concentration (1 - F) / F.
    """
    size_GL = counts_GLE.sum(axis=2)
    num_L = (size_GL > 0).sum(axis=0)
    layers = num_L > 1
    if not layers.any():
        return _MAX_CONCENTRATION
    counts, size_GL, num_L = counts_GLE[:, layers], size_GL[:, layers], num_L[layers]
    share = np.divide(counts, size_GL[:, :, None], out=np.zeros_like(counts), where=size_GL[:, :, None] > 0)
    total_L = size_GL.sum(axis=0)
    mean_LE = counts.sum(axis=0) / total_L[:, None]
    between_L = (size_GL[:, :, None] * (share - mean_LE) ** 2).sum(axis=(0, 2)) / (num_L - 1)
    freedom_L = np.maximum(total_L - num_L, 1.0)
    within_L = (size_GL[:, :, None] * share * (1 - share)).sum(axis=(0, 2)) / freedom_L
    typical_L = (total_L - (size_GL**2).sum(axis=0) / total_L) / (num_L - 1)
    apart, together = float((between_L - within_L).sum()), float((between_L + (typical_L - 1) * within_L).sum())
    if apart <= 0 or together <= 0:
        return _MAX_CONCENTRATION
    shared = apart / together
    return float(np.clip((1 - shared) / shared, _MIN_CONCENTRATION, _MAX_CONCENTRATION))
