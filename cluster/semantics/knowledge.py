"""What the scheduler has learned of prompts: clusters of them, and which experts the prompts of each use. Pure.

One versioned value, made by the scheduler from the shared statistics and handed to routers and attention workers,
which go on with the last one they have.

Shapes: G clusters, P numbers of an embedding, L MoE layers in the model's order, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Knowledge:
    """Versions only grow; statistics of another `clusters_version` belong to other clusters.

    centroids: (G, P) float32, unit length. uses: (G, L, E) float32, the chance that one decoded token of a prompt of
    the cluster activates the expert, shrunk to the global one by support; a layer's sum to its experts per token.
    prior: (L, E) float32, the same over all prompts. support: (G,) float32, decayed decoded tokens behind `uses`.
    mutual_information: bits per layer that the cluster tells of the expert; about 0 when it tells nothing.
    """

    version: int
    clusters_version: int
    layers: tuple[int, ...]
    centroids: np.ndarray
    uses: np.ndarray
    prior: np.ndarray
    support: np.ndarray
    mutual_information: float

    @property
    def is_finite(self) -> bool:
        """Whether it is made of numbers; else nobody is to choose by it."""
        arrays = (self.centroids, self.uses, self.prior, self.support)
        return bool(np.isfinite(self.mutual_information)) and all(bool(np.isfinite(array).all()) for array in arrays)
