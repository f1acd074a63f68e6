"""Fetches every expert of the next layer, whatever it will choose: DeepSpeed-Inference's (ZeRO) look-ahead."""

from __future__ import annotations

import numpy as np

from cluster.policies.prefetch.base import Forecast
from cluster.policies.signals import Grid


class WholeLayerPredictor:
    """All of the next layer; before the first, all of the first."""

    def __init__(self, grid: Grid) -> None:
        self._grid = grid

    def predict(self, row: int) -> Forecast | None:
        if row + 1 >= self._grid.num_layers:
            return None
        priority = np.zeros((self._grid.num_layers, self._grid.num_experts), dtype=np.float32)
        priority[row + 1] = 1.0
        return Forecast(priority, priority * (self._grid.top_k / self._grid.num_experts))
