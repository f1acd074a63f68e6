"""Knowledge of made-up kinds of prompt: kind g has the embedding `embedding_of(g)` and uses what the test says."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.semantics.knowledge import Knowledge

NUM_DIMS = 16


def embedding_of(kind: int) -> bytes:
    """Of a prompt that is of one kind only; orthogonal to all others."""
    vector = np.zeros(NUM_DIMS, dtype=np.int8)
    vector[kind] = 127
    return vector.tobytes()


def make_knowledge(uses: np.ndarray, *, layers: Sequence[int] | None = None, version: int = 1) -> Knowledge:
    """Args: uses: [G, L, E] of each kind."""
    num_kinds, num_layers, _ = uses.shape
    return Knowledge(
        version=version,
        clusters_version=1,
        layers=tuple(range(num_layers)) if layers is None else tuple(layers),
        centroids=np.eye(num_kinds, NUM_DIMS, dtype=np.float32),
        uses=uses.astype(np.float32),
        prior=uses.mean(axis=0).astype(np.float32),
        support=np.full(num_kinds, 1000.0, dtype=np.float32),
        mutual_information=1.0,
    )
