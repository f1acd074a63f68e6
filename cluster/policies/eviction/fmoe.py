"""fMoE's cache: how often an expert was used times the probability last searched for it.

Source: Yu et al., FineMoE (fMoE), EuroSys 2026, arXiv 2502.05370: PRI_ev = 1 / (p * freq), the largest is evicted; so
the score is p * freq, a float (the public code's integers make nearly all of them 0). Recency is ignored on purpose.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.expert_maps.search import MapSearch
from cluster.policies.signals import Grid, Silent


class FmoeScorer(Silent):
    """Reads the searched probabilities; the search must hear the signals."""

    def __init__(self, grid: Grid, search: MapSearch) -> None:
        self._search = search
        self._uses = np.zeros(grid.size)

    def on_use(self, indices: Sequence[int]) -> None:
        self._uses[indices] += 1

    def scores(self) -> np.ndarray:
        return self._uses * self._search.searched.reshape(-1)
