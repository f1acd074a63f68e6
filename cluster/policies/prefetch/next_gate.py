"""Applies the next layer's gate to this layer's input, and fetches what it would choose.

Source: mixtral-offloading (Eliseev and Mazur, arXiv 2312.17238), HybriMoE. Looks one layer ahead; knows nothing before
the first layer.
"""

from __future__ import annotations

import numpy as np

from cluster.policies.prefetch.base import BEFORE_FIRST, Forecast
from cluster.policies.signals import GateSignal, Grid, Silent


class NextGatePredictor(Silent):
    """The best of the next layer's gate, for each sequence.

    >>> predictor = NextGatePredictor(Grid((0, 1), num_experts=3, top_k=1))
    >>> probs, ahead = np.array([[0.5, 0.3, 0.2]]), np.array([[0.1, 0.2, 0.7]])
    >>> predictor.on_gate(GateSignal(0, probs, probs > 0.4, ahead))
    >>> predictor.predict(0).priority
    array([[0. , 0. , 0. ],
           [0. , 0. , 0.7]], dtype=float32)
    """

    def __init__(self, grid: Grid, *, num_fetched: int | None = None) -> None:
        """Args: num_fetched: experts of each sequence; default K (mixtral-offloading fetches 1 or 2 of 2)."""
        self._grid = grid
        self._num_fetched = min(num_fetched or grid.top_k, grid.num_experts)
        self._ahead: np.ndarray | None = None

    def on_gate(self, gate: GateSignal) -> None:
        self._ahead = gate.ahead

    def predict(self, row: int) -> Forecast | None:
        if row == BEFORE_FIRST or row + 1 >= self._grid.num_layers or self._ahead is None:
            return None
        probability = np.zeros((self._grid.num_layers, self._grid.num_experts), dtype=np.float32)
        best = np.argpartition(-self._ahead, self._num_fetched - 1, axis=1)[:, : self._num_fetched]
        chosen = np.zeros_like(self._ahead)
        np.put_along_axis(chosen, best, np.take_along_axis(self._ahead, best, axis=1), axis=1)
        probability[row + 1] = chosen.max(axis=0)
        return Forecast(probability, probability)
