"""Values experts by how often they are used: as it goes on (lfu), or as a trace said (static)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.signals import Grid, Silent

_RESCALE_AT = 1e12


class LfuScorer(Silent):
    """Least frequently used: uses counted as floats, older ones worth `decay` less each step.

    decay 1 is plain LFU. Instead of shrinking every count, a new use counts more: O(1) a use.
    """

    def __init__(self, grid: Grid, *, decay: float = 1.0) -> None:
        self._counts = np.zeros(grid.size)
        self._unit = 1.0
        self._growth = 1.0 / decay

    def on_use(self, indices: Sequence[int]) -> None:
        self._counts[indices] += self._unit

    def on_step_end(self) -> None:
        self._unit *= self._growth
        if self._unit > _RESCALE_AT:
            self._counts /= self._unit
            self._unit = 1.0

    def scores(self) -> np.ndarray:
        return self._counts


class StaticScorer(Silent):
    """Fixed values, such as the frequencies of a trace (KTransformers' and Fiddler's placement)."""

    def __init__(self, frequency: np.ndarray) -> None:
        """Args: frequency: [L, E]."""
        self._scores = np.asarray(frequency, dtype=np.float64).reshape(-1)

    def on_use(self, indices: Sequence[int]) -> None:
        """Changes nothing."""

    def scores(self) -> np.ndarray:
        return self._scores
