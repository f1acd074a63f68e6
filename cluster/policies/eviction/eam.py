"""MoE-Infinity's cache: predicted activation of the running requests, early layers favoured.

Source: arXiv 2401.14361: prio(e) = (pEAM[l, e] / sum_j pEAM[l, j] + eps) * (1 - l / L), the lowest is evicted. The
decay counts from layer 0: prefetch cannot help early layers.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.request_activations import ActivationTracker
from cluster.policies.signals import Grid, Silent

_EPSILON = 1e-4


class EamScorer(Silent):
    """Reads the tracker's prediction; the tracker must hear the signals."""

    def __init__(self, grid: Grid, tracker: ActivationTracker) -> None:
        self._tracker = tracker
        self._of_layer = 1 - np.arange(grid.num_layers)[:, None] / grid.num_layers
        self._predicted: np.ndarray | None = None
        self._scores = np.zeros(grid.size)

    def on_use(self, indices: Sequence[int]) -> None:
        """Uses are known from the gates."""

    def scores(self) -> np.ndarray:
        predicted = self._tracker.predicted
        if predicted is not self._predicted:
            self._predicted = predicted
            self._scores = ((predicted + _EPSILON) * self._of_layer).reshape(-1)
        return self._scores
