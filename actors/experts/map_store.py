"""Past expert maps with the embeddings they came with: fMoE's store.

Pure arrays; knows nothing of requests in progress. Bounded; a slot holds an entry or nothing, which never matches.

Source: Yu et al., FineMoE (fMoE), EuroSys 2026, arXiv 2502.05370.

Shapes: C entries, L MoE layers, E experts of a layer, D model dim, S queries.
"""

from __future__ import annotations

import os
import zipfile
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from actors.experts.signals import Grid
from cluster.errors import ConfigError

STORE_VERSION = 1
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
        self._maps = np.zeros((grid.num_layers, capacity, grid.num_experts), dtype=np.float32)  # a layer is one block
        self._embeddings = np.zeros((capacity, dim), dtype=np.float32)
        self._unit_embeddings = np.zeros((capacity, dim), dtype=np.float32)
        self._inverse_norms = np.zeros((grid.num_layers, capacity), dtype=np.float32)  # of the layers up to this one

    def match_embeddings(self, embeddings: np.ndarray) -> np.ndarray:
        """Cosine [S, size] of embeddings [S, D] with those stored."""
        return _unit(embeddings) @ self._unit_embeddings[: self.size].T

    def begin_match(self, num_queries: int) -> TrajectoryMatch:
        """A match that has observed nothing yet. Valid until the next insert."""
        return TrajectoryMatch(np.zeros((num_queries, self.size), dtype=np.float32), np.zeros(num_queries))

    def observe(self, match: TrajectoryMatch, probs: np.ndarray) -> np.ndarray:
        """Take in the next layer's probabilities [S, E]; cosine [S, size] of the layers observed so far."""
        row = match.num_observed
        match.dots += probs @ self._maps[row, : self.size].T
        match.squares += np.einsum("se,se->s", probs, probs)
        match.num_observed = row + 1
        norms = np.maximum(np.sqrt(match.squares), _TINY)[:, None].astype(np.float32)
        return match.dots * (self._inverse_norms[row, : self.size] / norms)

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
            taken.add(slot)
            self._put(slot, embedding, gate_map)

    def save(self, path: Path, fingerprint: str) -> None:
        """Write the entries, whole or not at all. Args: fingerprint: of the model the maps are of."""
        partial = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.savez(
                    file,
                    version=STORE_VERSION,
                    fingerprint=fingerprint,
                    maps=self._maps[:, : self.size].swapaxes(0, 1).astype(np.float16),
                    embeddings=self._embeddings[: self.size].astype(np.float16),
                )
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)

    def load(self, path: Path, fingerprint: str) -> None:
        """Insert the entries of a file; of more than fit, the usual replacement decides.

        Raises:
            ConfigError: not a store file, of another version, or of another model (names both fingerprints).
        """
        try:
            with np.load(path, allow_pickle=False) as file:
                version, stored = int(file["version"]), str(file["fingerprint"])
                maps, embeddings = file["maps"].astype(np.float32), file["embeddings"].astype(np.float32)
        except (OSError, ValueError, KeyError, TypeError, AttributeError, EOFError, zipfile.BadZipFile) as error:
            raise ConfigError(f"{path}: not an expert map store ({error})") from error
        if version != STORE_VERSION:
            raise ConfigError(f"{path}: expert map store of version {version}, this program reads {STORE_VERSION}")
        if stored != fingerprint:
            raise ConfigError(f"{path}: expert map store of the model {stored}, the model here is {fingerprint}")
        if maps.shape[1:] != (self.grid.num_layers, self.grid.num_experts) or embeddings.shape != (len(maps), self.dim):
            raise ConfigError(f"{path}: maps {maps.shape} and embeddings {embeddings.shape} do not fit the model")
        for start in range(len(maps)):  # one by one: entries of a file may replace each other
            self.insert(embeddings[start : start + 1], maps[start : start + 1])

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
