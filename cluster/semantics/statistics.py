"""Activations by cluster of prompts: how often gates chose each expert, and with what weight. Values and sums, pure.

Shapes: G clusters, C = G + 1 (the last: prompts of no cluster), 2 phases in the order of `Phase`, L MoE layers in the
model's order, E experts of a layer, 2 measures (COUNT, MASS).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.types import Phase

COUNT, MASS = 0, 1
"""The measures: activations, and the sum of their routing weights."""

PREFILL, DECODE = (list(Phase).index(phase) for phase in (Phase.PREFILL, Phase.DECODE))


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class ExpertStatistics:
    """Activations of the prompts that clusters of one version tell apart; version 0 tells none apart.

    values: (C, 2, L, E, 2) float64. A worker's grow, the store's are decayed sums.
    """

    clusters_version: int
    layers: tuple[int, ...]
    values: np.ndarray

    @property
    def num_clusters(self) -> int:
        """G."""
        return self.values.shape[0] - 1

    @property
    def num_experts(self) -> int:
        """E."""
        return self.values.shape[3]

    def decode_counts(self) -> np.ndarray:
        """(C, L, E) activations by tokens that extended an answer: what decode uses is not what prefill's union is."""
        return self.values[:, DECODE, :, :, COUNT]

    def minus(self, earlier: ExpertStatistics) -> ExpertStatistics:
        """What was counted since `earlier`, a copy of the same statistics."""
        return replace(self, values=self.values - earlier.values)

    def check_finite(self) -> None:
        """Raise `ValueError` for sums that are none: added to others they would spoil those for good."""
        if not np.isfinite(self.values).all():
            raise ValueError("statistics with numbers that are not finite; they are not added to others'")

    def copy(self) -> ExpertStatistics:
        """Independent of this one's array."""
        return replace(self, values=self.values.copy())


def no_statistics(
    clusters_version: int, num_clusters: int, layers: Sequence[int], num_experts: int
) -> ExpertStatistics:
    """Nothing counted yet."""
    shape = (num_clusters + 1, len(Phase), len(layers), num_experts, 2)
    return ExpertStatistics(clusters_version=clusters_version, layers=tuple(layers), values=np.zeros(shape))
