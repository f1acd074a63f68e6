"""Clusters of recent prompts: balanced k-means on the unit sphere, fitted again when prompts have changed. Pure.

Balanced, so that every cluster gets statistics: fitting lets none have more than MAX_SHARE times an even share of the
sample (assignment in the order of what a point loses elsewhere; the idea of Bennett, Bradley and Demiriz 2000 with
capacities above only). Afterwards a prompt belongs to the nearest centroid.

Statistics are carried over to new clusters (`carry_over`): each old cluster's counts go where its recent prompts went.
To start anew would make every worker's routing and prefetch blind for the first minutes after each change.

Shapes: N prompts of the sample, P numbers of an embedding, G clusters.
"""

from __future__ import annotations

import io
from collections.abc import Sequence

import numpy as np

from cluster.semantics.embedding import unit_vector, unit_vectors
from cluster.semantics.statistics import ExpertStatistics, no_statistics

MAX_SHARE = 1.5
"""Largest over mean number of a fit's prompts in a cluster, but for rounding up."""

_PROMPTS_PER_CLUSTER = 8  # at least: fewer prompts make fewer clusters
_MIN_GROWTH = 1.5  # of the number of clusters, while prompts gather, to be worth a new version
_MIN_GAIN = 0.1  # of what the present clusters leave unexplained, to be worth a new version
_MAX_ROUNDS = 30


class Clusters:
    """The current version of the clusters, and the prompts that the next one is fitted to.

    version: 0 while there are none. centroids: (G, P) float32, unit length.
    """

    def __init__(self, max_clusters: int, *, version: int = 0) -> None:
        """Args: version: the last one that anybody knows of, where the clusters themselves were lost."""
        self.version = version
        self.centroids = np.empty((0, 0), dtype=np.float32)
        self._max_clusters = max_clusters
        self._sample_NP = np.empty((0, 0), dtype=np.float32)
        self._moves: tuple[int, np.ndarray] | None = None  # from which version, (G, old G) shares of what goes where

    def observe(self, embeddings: Sequence[bytes]) -> None:
        """Recent prompts, all of them: what was observed before is forgotten."""
        self._sample_NP = unit_vectors(embeddings)

    def assign(self, embedding: bytes) -> int:
        """The cluster of a prompt; -1 without one."""
        return nearest_cluster(self.centroids, embedding)

    def fit(self) -> int:
        """Fit anew if the observed prompts are worth it; the version then."""
        sample = self._sample_NP
        num = min(self._max_clusters, len(sample) // _PROMPTS_PER_CLUSTER)
        fits = self.centroids.shape[1:] == sample.shape[1:] and len(self.centroids) <= self._max_clusters
        old = self.centroids if fits else self.centroids[:0]
        if num < 2 or (len(old) and num < len(old)):
            return self.version
        grows = num >= _MIN_GROWTH * len(old) or (num == self._max_clusters > len(old))
        if len(old) and not grows:
            num = len(old)
        fitted = _balanced_kmeans(sample, old, num)
        if not grows and _unexplained(sample, fitted) > (1 - _MIN_GAIN) * _unexplained(sample, old):
            return self.version
        self._moves = (self.version, _moved_shares(sample, self.centroids, fitted))
        self.version, self.centroids = self.version + 1, fitted
        return self.version

    def carry_over(self, statistics: ExpertStatistics) -> ExpertStatistics:
        """Statistics of the version before the last fit, as those of the present one.

        Raises:
            ValueError: they are of another version.
        """
        if self._moves is None or self._moves[0] != statistics.clusters_version:
            raise ValueError(f"statistics of clusters version {statistics.clusters_version} cannot be carried over")
        shares = self._moves[1]
        carried = no_statistics(self.version, len(self.centroids), statistics.layers, statistics.num_experts)
        carried.values[-1] = statistics.values[-1]
        if shares.shape[1] == statistics.num_clusters:
            carried.values[:-1] = np.tensordot(shares, statistics.values[:-1], axes=1)
        else:
            carried.values[-1] += statistics.values[:-1].sum(axis=0)
        return carried

    def to_bytes(self) -> bytes:
        """What `from_bytes` makes the same clusters from; without the sample, which is in the store."""
        buffer = io.BytesIO()
        np.savez(buffer, version=np.int64(self.version), centroids=self.centroids)
        return buffer.getvalue()

    @classmethod
    def from_bytes(cls, blob: bytes, max_clusters: int) -> Clusters:
        """Raises: ValueError, KeyError or OSError for anything but what `to_bytes` gave."""
        with np.load(io.BytesIO(blob), allow_pickle=False) as arrays:
            clusters = cls(max_clusters, version=int(arrays["version"]))
            clusters.centroids = arrays["centroids"]
            if not np.isfinite(clusters.centroids).all():
                raise ValueError("centroids that are not finite")
        return clusters


def nearest_cluster(centroids_GP: np.ndarray, embedding: bytes) -> int:
    """The cluster whose centroid is nearest in direction; -1 where there is none, or without an embedding."""
    vector = unit_vector(embedding)
    if not len(vector) or not len(centroids_GP) or centroids_GP.shape[1] != len(vector):
        return -1
    return int((centroids_GP @ vector).argmax())


def balanced_assignment(likeness_NG: np.ndarray, capacity: int) -> np.ndarray:
    """(N,) cluster of each point, none with more than `capacity` >= N / G.

    Points that lose most elsewhere choose first; who finds its cluster full chooses among the others.
    """
    num_points, num_clusters = likeness_NG.shape
    result = np.full(num_points, -1, dtype=np.int64)
    room = np.full(num_clusters, capacity)
    waiting = _unassigned(result)
    while len(waiting):
        likeness = np.where(room > 0, likeness_NG[waiting], -np.inf)
        best = likeness.argmax(axis=1)
        highest = likeness[np.arange(len(waiting)), best]
        if num_clusters > 1:
            second = np.partition(likeness, -2, axis=1)[:, -2]
            regret = highest - np.where(np.isfinite(second), second, highest)
        else:
            regret = highest
        for cluster in range(num_clusters):
            wants = np.flatnonzero(best == cluster)
            taken = wants[np.argsort(-regret[wants], kind="stable")][: room[cluster]]
            result[waiting[taken]] = cluster
            room[cluster] -= len(taken)
        waiting = _unassigned(result)
    return result


def _unassigned(result: np.ndarray) -> np.ndarray:
    return np.flatnonzero(result < 0)


def _balanced_kmeans(sample_NP: np.ndarray, start_GP: np.ndarray, num: int) -> np.ndarray:
    """(num, P) unit centroids; starts from those given, and from the points farthest from all others chosen."""
    capacity = int(np.ceil(MAX_SHARE * len(sample_NP) / num))
    centroids = _with_seeds(sample_NP, start_GP, num)
    members = np.full(len(sample_NP), -1)
    for _ in range(_MAX_ROUNDS):
        likeness = sample_NP @ centroids.T
        chosen = balanced_assignment(likeness, capacity)
        if (chosen == members).all():
            break
        members = chosen
        sizes = np.bincount(members, minlength=num)
        sums = np.zeros(centroids.shape, dtype=np.float64)
        np.add.at(sums, members, sample_NP)
        for dead in np.flatnonzero(sizes == 0):  # it takes the point that the largest cluster fits least
            largest = np.flatnonzero(members == sizes.argmax())
            sums[dead] = sample_NP[largest[likeness[largest, sizes.argmax()].argmin()]]
        lengths = np.linalg.norm(sums, axis=1, keepdims=True)
        centroids = np.where(lengths > 0, sums / np.maximum(lengths, 1e-12), centroids).astype(np.float32)
    return centroids


def _with_seeds(sample_NP: np.ndarray, start_GP: np.ndarray, num: int) -> np.ndarray:
    """k-means++ (Arthur and Vassilvitskii 2007), with a fixed generator: the same prompts give the same clusters."""
    generator = np.random.default_rng(0)
    chosen = [*start_GP[:num]]
    if not chosen:
        chosen.append(sample_NP[0])
    nearest = (sample_NP @ np.stack(chosen).T).max(axis=1)
    while len(chosen) < num:
        distance = np.maximum(1.0 - nearest.astype(np.float64), 0.0)
        total = distance.sum()
        weights = distance / total if total > 0 else np.full(len(distance), 1 / len(distance))
        seed = sample_NP[generator.choice(len(sample_NP), p=weights)]
        chosen.append(seed)
        nearest = np.maximum(nearest, sample_NP @ seed)
    return np.stack(chosen).astype(np.float32)


def _unexplained(sample_NP: np.ndarray, centroids_GP: np.ndarray) -> float:
    """Mean distance of a prompt to its nearest centroid, 1 - cosine."""
    return float(1.0 - (sample_NP @ centroids_GP.T).max(axis=1).mean())


def _moved_shares(sample_NP: np.ndarray, old_GP: np.ndarray, new_GP: np.ndarray) -> np.ndarray:
    """(new G, old G): which share of each old cluster's prompts is in each new one; columns sum to 1.

    (new G, 0) where the two cannot be compared.
    """
    if not len(old_GP) or old_GP.shape[1] != new_GP.shape[1]:
        return np.zeros((len(new_GP), 0))
    shares = np.zeros((len(new_GP), len(old_GP)))
    before, after = (sample_NP @ old_GP.T).argmax(axis=1), (sample_NP @ new_GP.T).argmax(axis=1)
    np.add.at(shares, (after, before), 1.0)
    empty = np.flatnonzero(shares.sum(axis=0) == 0)  # none of its prompts is recent: to the most alike
    shares[(old_GP[empty] @ new_GP.T).argmax(axis=1), empty] = 1.0
    return shares / shares.sum(axis=0)
