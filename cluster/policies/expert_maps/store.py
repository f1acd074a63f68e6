"""Past expert maps with the embeddings they came with: fMoE's store.

Pure arrays; knows nothing of requests in progress. Bounded; a slot holds an entry or nothing, which never matches.

Source: Yu et al., FineMoE (fMoE), EuroSys 2026, arXiv 2502.05370.

Shapes: C entries, L MoE layers, E experts of a layer, D model dim, S queries.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.errors import ConfigError
from cluster.policies.policy_state import NUM_LEARNED
from cluster.policies.signals import Grid

DEFAULT_CAPACITY = 1000
_TINY = 1e-12


@dataclass(slots=True)
class TrajectoryMatch:
    """How the gates observed so far in a step agree with the first layers of every stored map.

    dots: [S, C], squares: [S], both grow layer by layer, so that a layer costs one product.
    """

    dots: np.ndarray
    squares: np.ndarray
    num_observed: int = field(default=0)


class MapStore:
    """(embedding [D], map [L, E]) pairs."""

    def __init__(self, grid: Grid, *, dim: int, capacity: int = DEFAULT_CAPACITY, distance: int = 3) -> None:
        """Args: distance: d, layers between what is observed and what is predicted; weighs redundancy."""
        self.grid, self.dim, self.capacity, self.distance = grid, dim, capacity, distance
        self.size = 0
        self._num_inserted = 0
        self._maps = np.zeros((grid.num_layers, capacity, grid.num_experts), dtype=np.float32)  # a layer is one block
        self._embeddings = np.zeros((capacity, dim), dtype=np.float32)
        self._unit_embeddings = np.zeros((capacity, dim), dtype=np.float32)
        self._inverse_norms = np.zeros((grid.num_layers, capacity), dtype=np.float32)  # of the layers up to this one

    def match_embeddings(self, embeddings: np.ndarray) -> np.ndarray:
        """Cosine [S, size] of embeddings [S, D] with those stored."""
        return _unit(embeddings) @ self._unit_embeddings[: self.size].T

    def begin_match(self, num_queries: int) -> TrajectoryMatch:
        """A match that has observed nothing yet; entries inserted later are not matched."""
        return TrajectoryMatch(np.zeros((num_queries, self.size), dtype=np.float32), np.zeros(num_queries))

    def observe(self, match: TrajectoryMatch, probs: np.ndarray) -> np.ndarray:
        """Take in the next layer's probabilities [S, E]; cosine [S, size] of the layers observed so far."""
        row, known = match.num_observed, match.dots.shape[1]
        match.dots += probs @ self._maps[row, :known].T
        match.squares += np.einsum("se,se->s", probs, probs)
        match.num_observed = row + 1
        norms = np.maximum(np.sqrt(match.squares), _TINY)[:, None].astype(np.float32)
        return match.dots * (self._inverse_norms[row, :known] / norms)

    def rows(self, entries: np.ndarray, row: int) -> np.ndarray:
        """Probabilities of some entries at a layer [S, E]."""
        return self._maps[row, entries]

    def insert(self, embeddings: np.ndarray, maps: np.ndarray, redundancy: np.ndarray | None = None) -> None:
        """Add entries [S, D], [S, L, E]; when full, each replaces the stored one most redundant to it.

        RDY = d / L * cos(embeddings) + (L - d) / L * cos(maps), the largest is overwritten. No two entries of one
        call share a slot; entries without any probability are not stored.

        Args: redundancy: [S, size] RDY where a search has it already.
        """
        taken: set[int] = set()
        for i, (embedding, gate_map) in enumerate(zip(embeddings, maps, strict=True)):
            if not gate_map.any() or len(taken) == self.capacity:
                continue
            slot = self.size
            if slot == self.capacity:
                known = redundancy is not None and redundancy.shape[1] == self.capacity
                of_entry = (
                    redundancy[i].copy() if known and redundancy is not None else self._redundancy(embedding, gate_map)
                )
                of_entry[list(taken)] = -np.inf
                slot = int(of_entry.argmax())
            self.size = max(self.size, slot + 1)
            self._num_inserted += 1
            taken.add(slot)
            self._put(slot, embedding, gate_map)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """A copy of the entries: maps [size, L, E], embeddings [size, D], and how many were ever inserted."""
        return {
            NUM_LEARNED: np.array(self._num_inserted),
            "maps": self._maps[:, : self.size].swapaxes(0, 1).copy(),
            "embeddings": self._embeddings[: self.size].copy(),
        }

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Insert such entries; of more than fit, the usual replacement decides.

        Raises:
            ConfigError: fields are missing, or do not fit the model.
        """
        missing = [name for name in ("maps", "embeddings", NUM_LEARNED) if name not in arrays]
        if missing:
            raise ConfigError(f"expert maps without {', '.join(missing)}: only {', '.join(arrays)}")
        maps, embeddings = arrays["maps"], arrays["embeddings"]
        expected = (self.grid.num_layers, self.grid.num_experts)
        if maps.shape[1:] != expected or embeddings.shape != (len(maps), self.dim):
            raise ConfigError(
                f"expert maps {maps.shape} with embeddings {embeddings.shape}; the model here needs "
                f"(n, {expected[0]}, {expected[1]}) and (n, {self.dim})"
            )
        known = self._num_inserted
        for start in range(len(maps)):  # one by one: they may replace each other
            one = slice(start, start + 1)
            self.insert(embeddings[one].astype(np.float32), maps[one].astype(np.float32))
        self._num_inserted = known + max(int(arrays[NUM_LEARNED]), 0)

    def redundancy(self, semantic: np.ndarray, trajectory: np.ndarray) -> np.ndarray:
        """RDY from the two cosines, that of whole maps."""
        share = min(self.distance / self.grid.num_layers, 1.0)
        return share * semantic + (1 - share) * trajectory

    def _redundancy(self, embedding: np.ndarray, gate_map: np.ndarray) -> np.ndarray:
        semantic = self._unit_embeddings @ _unit(embedding)
        dots = np.matmul(self._maps, gate_map.astype(np.float32)[:, :, None]).sum(axis=(0, 2))
        return self.redundancy(semantic, dots * self._inverse_norms[-1] / float(np.linalg.norm(gate_map)))

    def _put(self, slot: int, embedding: np.ndarray, gate_map: np.ndarray) -> None:
        self._maps[:, slot] = gate_map
        self._embeddings[slot] = embedding
        self._unit_embeddings[slot] = _unit(embedding)
        norms = np.sqrt(np.cumsum(np.square(gate_map).sum(axis=1)))
        self._inverse_norms[:, slot] = 1 / np.maximum(norms, _TINY)


def _unit(vectors: np.ndarray) -> np.ndarray:
    norms = np.linalg.norm(vectors, axis=-1, keepdims=True)
    return np.divide(vectors, norms, out=np.zeros(vectors.shape, dtype=np.float32), where=norms > 0)
