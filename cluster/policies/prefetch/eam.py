"""MoE-Infinity's prefetch: predicted activations of all later layers, near ones first.

Source: arXiv 2401.14361, PredictEAM: cells of later layers times 1 - (i - l) / L, queued by value.
"""

from __future__ import annotations

import numpy as np

from cluster.policies.prefetch.base import Forecast
from cluster.policies.request_activations import ActivationTracker
from cluster.policies.signals import Grid


class EamPredictor:
    """Reads the tracker's prediction; the tracker must hear the signals."""

    def __init__(self, grid: Grid, tracker: ActivationTracker) -> None:
        self._grid = grid
        self._tracker = tracker

    def predict(self, row: int) -> Forecast | None:
        distance = np.arange(self._grid.num_layers)[:, None] - row
        near = np.where(distance > 0, 1 - distance / self._grid.num_layers, 0)
        probability = np.minimum(self._tracker.predicted * self._grid.top_k, 1)
        return Forecast(self._tracker.predicted * near, np.where(distance > 0, probability, 0))
