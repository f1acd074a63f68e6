"""Evicts the resident expert with the lowest score; among equals the one used longest ago."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np

from actors.experts.policies.base import Scorer
from actors.experts.signals import Grid
from cluster.types import ExpertId


class LowestScorePolicy:
    """An eviction policy around a scorer."""

    def __init__(self, grid: Grid, scorer: Scorer) -> None:
        self._scorer = scorer
        self._experts = [grid.expert(index) for index in range(grid.size)]
        self._indices = {expert: index for index, expert in enumerate(self._experts)}
        self._bar = np.full(grid.size, np.inf)  # 0 for residents
        self._last_use = np.zeros(grid.size, dtype=np.int64)
        self._clock = 0

    def on_use(self, expert: ExpertId) -> None:
        index = self._indices[expert]
        self._touch(index)
        self._scorer.on_use(index)

    def on_insert(self, expert: ExpertId) -> None:
        index = self._indices[expert]
        self._bar[index] = 0.0
        self._touch(index)

    def on_evict(self, expert: ExpertId) -> None:
        self._bar[self._indices[expert]] = np.inf

    def choose_victim(self, pinned: Collection[ExpertId]) -> ExpertId | None:
        scores = self._scorer.scores() + self._bar
        victim = self._lowest(scores)
        if victim in pinned:  # rare where few are pinned, so looked at only now
            scores[[self._indices[expert] for expert in pinned]] = np.inf
            victim = self._lowest(scores)
        return victim

    def _lowest(self, scores: np.ndarray) -> ExpertId | None:
        index = int(scores.argmin())
        lowest = scores[index]
        if lowest == np.inf:
            return None
        equal = (scores == lowest).nonzero()[0]
        if len(equal) > 1:
            index = int(equal[self._last_use[equal].argmin()])
        return self._experts[index]

    def _touch(self, index: int) -> None:
        self._clock += 1
        self._last_use[index] = self._clock
