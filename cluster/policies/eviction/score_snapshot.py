"""Lets one thread keep a policy's values up to date while others evict by them.

The searching thread publishes copies; who evicts reads the last one, at most a layer old. Uses are told at once.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.base import Scorer


class ScoreSnapshot:
    """A scorer in front of another one."""

    def __init__(self, scorer: Scorer, size: int) -> None:
        """Args: size: experts of the grid."""
        self._scorer = scorer
        self._latest = np.zeros(size, np.float32)

    def on_use(self, indices: Sequence[int]) -> None:
        self._scorer.on_use(indices)

    def scores(self) -> np.ndarray:
        return self._latest

    def publish(self, scores: np.ndarray | None = None) -> None:
        """Args: scores: [N] instead of the policy's own."""
        self._latest = sound_scores(self._scorer.scores() if scores is None else scores).copy()


def sound_scores(scores: np.ndarray) -> np.ndarray:
    """The scores, those that are not finite as 0: an expert of which nothing can be said is worth nothing."""
    return scores if np.isfinite(scores).all() else np.where(np.isfinite(scores), scores, 0.0)
