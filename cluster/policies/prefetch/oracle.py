"""Knows what comes: the bound of every predictor. Replay only."""

from __future__ import annotations

import numpy as np

from cluster.policies.future import NEVER, Future
from cluster.policies.prefetch.base import Forecast
from cluster.policies.signals import Grid


class OraclePredictor:
    """Names the next `num_wanted` experts in the order of their use."""

    def __init__(self, grid: Grid, future: Future, *, num_wanted: int) -> None:
        """Args: num_wanted: as many as the memory holds, so that nothing needed sooner is given up for one later."""
        self._shape = (grid.num_layers, grid.num_experts)
        self._future = future
        self._num_wanted = min(num_wanted, grid.size)

    def predict(self, row: int) -> Forecast | None:
        uses = self._future.next_use
        horizon = np.partition(uses, self._num_wanted - 1)[self._num_wanted - 1]
        wanted = (uses <= horizon) & (uses < NEVER)
        priority = np.where(wanted, 1.0 / np.maximum(uses - self._future.now, 1), 0.0)
        return Forecast(priority.reshape(self._shape), wanted.astype(np.float32).reshape(self._shape))
