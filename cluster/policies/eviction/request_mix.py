"""The loop from routing to residency: experts that a worker's requests are expected to use are worth more.

Requests of a kind are sent where such requests are; the memory there keeps what they use, also through steps in which
nobody happens to, and so attracts the next one.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.base import Scorer
from cluster.semantics.request_mix import RequestMix

MIX_WEIGHT = 0.5


class RequestMixScorer:
    """Another scorer's values plus a share of what the requests use. For values between 0 and 1 (moesaic)."""

    def __init__(self, scorer: Scorer, mix: RequestMix, *, weight: float = MIX_WEIGHT) -> None:
        """Args: mix: of the worker's requests; kept up to date by who admits them, on any thread."""
        self._scorer, self._mix, self._weight = scorer, mix, weight

    def on_use(self, indices: Sequence[int]) -> None:
        self._scorer.on_use(indices)

    def scores(self) -> np.ndarray:
        values, uses = self._scorer.scores(), self._mix.uses
        return values if uses is None or len(uses) != len(values) else values + self._weight * uses
