"""Evicts what is used latest from now on: the optimum without prefetch. Needs the future, so it lives in replay only.

Source: Belady, A study of replacement algorithms for a virtual-storage computer, 1966.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.future import Future
from cluster.policies.signals import Silent


class BeladyScorer(Silent):
    """Reads the future, which must hear the signals."""

    def __init__(self, future: Future) -> None:
        self._future = future

    def on_use(self, indices: Sequence[int]) -> None:
        """Uses are known."""

    def scores(self) -> np.ndarray:
        return -self._future.next_use
