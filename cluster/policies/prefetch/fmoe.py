"""fMoE's prefetch: the experts selected from the nearest expert maps, by probability over distance.

Source: arXiv 2502.05370: PRI_pf = p / (l - l_now). Sequences of a step are planned one by one, the maximum counts.
"""

from __future__ import annotations

import numpy as np

from cluster.policies.expert_maps.search import MapSearch
from cluster.policies.prefetch.base import Forecast
from cluster.policies.signals import Grid


class FmoePredictor:
    """Reads the search's plan; the search must hear the signals."""

    def __init__(self, grid: Grid, search: MapSearch) -> None:
        self._grid = grid
        self._search = search

    def predict(self, row: int) -> Forecast | None:
        plan = self._search.plan
        if not len(plan):
            return None
        distance = np.arange(self._grid.num_layers)[:, None] - row
        likeliest = np.where(distance > 0, plan.max(axis=0), 0)
        return Forecast(likeliest / np.maximum(distance, 1), likeliest)
