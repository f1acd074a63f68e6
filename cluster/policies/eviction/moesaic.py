"""Moesaic's own eviction: what is used latest goes first, by the estimate of NextUse.

The time to the next use includes the distance in layers, so of two experts equally likely the one whose layer has just
passed is worth less. Where everything is certain this is Belady's rule.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.next_use.estimate import NextUse


class MoesaicScorer:
    """The expected discounted time to the next use, over all sequences of the step."""

    def __init__(self, next_use: NextUse) -> None:
        """`next_use` hears the signals."""
        self._next_use = next_use

    def on_use(self, indices: Sequence[int]) -> None:
        """Uses are known from the gates."""

    def scores(self) -> np.ndarray:
        return self._next_use.values()
