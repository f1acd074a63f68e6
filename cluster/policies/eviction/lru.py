"""Evicts the expert that was not used for the longest time: over all layers together, or within its layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.signals import GateSignal, Grid, Silent, StepSignal


class LruScorer:
    """All experts are worth the same: what was used longest ago goes first."""

    def __init__(self, size: int) -> None:
        """Args: size: experts of the grid."""
        self._scores = np.zeros(size)

    def on_use(self, indices: Sequence[int]) -> None:
        """The order of use is known to who evicts."""

    def scores(self) -> np.ndarray:
        return self._scores


class LruPerLayerScorer(Silent):
    """Least recently used within a layer, of which every layer keeps the same share of the memory.

    Source: mixtral-offloading (Eliseev and Mazur, arXiv 2312.17238), ProMoE (arXiv 2410.22134). An expert is worth the
    less the more others of its layer were used since: the layer that holds most gives one up, so all hold the same, and
    what was fetched ahead in vain goes first. Uses are heard from the gates, before room is made for what they chose.

    >>> LruPerLayerScorer(Grid((0, 1), num_experts=2, top_k=1)).scores()
    array([0., 0., 0., 0.])
    """

    def __init__(self, grid: Grid) -> None:
        self._last_use = np.zeros((grid.num_layers, grid.num_experts), dtype=np.int64)
        self._scores = np.zeros((grid.num_layers, grid.num_experts))
        self._clock = 0
        self._before = self._last_use, self._scores  # the step

    def on_use(self, indices: Sequence[int]) -> None:
        """Uses are known from the gates."""

    def on_step(self, step: StepSignal) -> None:
        self._before = self._last_use.copy(), self._scores.copy()

    def on_step_broken(self) -> None:
        self._last_use[:], self._scores[:] = self._before

    def on_gate(self, gate: GateSignal) -> None:
        self._clock += 1
        last_use = self._last_use[gate.row]
        last_use[gate.counts.any(axis=0)] = self._clock
        self._scores[gate.row, last_use.argsort(kind="stable")] = np.arange(len(last_use)) - len(last_use)

    def scores(self) -> np.ndarray:
        return self._scores.reshape(-1)
