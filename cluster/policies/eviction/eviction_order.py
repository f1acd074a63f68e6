"""Which resident leaves first: the one of the lowest score, among equals the one used longest ago.

Pure; experts are flat indices of a grid. The memory tells it what is resident and in use.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from cluster.policies.base import Scorer
from cluster.policies.eviction.score_snapshot import sound_scores

_PROTECTED = 1e12  # above any score, and small enough that scores still tell the kept apart


class EvictionOrder:
    """The residents of one memory, by the scores of one policy."""

    def __init__(self, scorer: Scorer, size: int) -> None:
        """Args: size: experts of the grid."""
        self._scorer = scorer
        self._bar = np.full(size, np.inf)  # for residents 0, or _PROTECTED
        self._protected = np.zeros(size)
        self._last_use = np.zeros(size, dtype=np.int64)
        self._last_uses = self._last_use.data  # the same: an element is written faster
        self._clock = 0

    def on_insert(self, index: int) -> None:
        """An expert became resident."""
        self._bar[index] = self._protected[index]
        self.touch((index,))

    def on_evict(self, index: int) -> None:
        """An expert left."""
        self._bar[index] = np.inf

    def protect(self, protected: np.ndarray) -> None:
        """From now on these leave after all others. Args: protected: [N] bool."""
        self._protected = np.where(protected, _PROTECTED, 0.0)
        np.copyto(self._bar, self._protected, where=self._bar < np.inf)

    def touch(self, indices: Iterable[int]) -> None:
        """Residents are used, in this order; the scorer is told by somebody else."""
        clock, last_uses = self._clock, self._last_uses
        for index in indices:
            clock += 1
            last_uses[index] = clock
        self._clock = clock

    def scores(self) -> np.ndarray:
        """[N] what experts are worth, resident or not; finite, whatever the policy says."""
        return sound_scores(self._scorer.scores())

    def victim(self, kept: np.ndarray | None = None) -> int | None:
        """The resident to evict next; None if there is none. Args: kept: [L * E] bool, which ones may not leave."""
        victims = self.victims(1, kept)
        return victims[0] if victims else None

    def victims(self, count: int, kept: np.ndarray | None = None) -> list[int]:
        """At most `count` residents in the order in which they are to be evicted."""
        scores = self._scorer.scores() + self._bar
        if kept is not None:
            np.copyto(scores, np.inf, where=kept)
        is_sound = False
        victims: list[int] = []
        while len(victims) < count:
            index = int(scores.argmin())
            lowest = scores[index]
            if not np.isfinite(lowest) and not is_sound:  # nobody is left, or a score is no number: argmin finds those
                is_sound = True
                scores = self.scores() + self._bar
                if kept is not None:
                    np.copyto(scores, np.inf, where=kept)
                scores[victims] = np.inf
                continue
            if lowest == np.inf:
                break
            equal = (scores == lowest).nonzero()[0]
            if len(equal) > 1:
                index = int(equal[self._last_use[equal].argmin()])
            victims.append(index)
            scores[index] = np.inf
        return victims
