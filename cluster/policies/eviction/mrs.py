"""Minus Recent Score, HybriMoE's cache: a moving average of the best gate probabilities of every layer.

Source: Zhong et al., HybriMoE, DAC 2025, arXiv 2504.05897: S <- alpha * TopP(s) + (1 - alpha) * S, evict the lowest;
p = 2K. A high score that was not chosen is likelier next step. Where we differ: s is the mean over a step's sequences,
each of them the mean over its tokens, so that a long prefill does not outweigh what decodes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.signals import GateSignal, Grid, Silent, StepSignal


class MrsScorer(Silent):
    """Recent gate probability."""

    def __init__(self, grid: Grid, *, alpha: float = 0.2, num_kept: int | None = None) -> None:
        """Args: num_kept: p; default 2K."""
        self._scores = np.zeros((grid.num_layers, grid.num_experts))
        self._before = self._scores  # the step
        self._alpha = alpha
        self._num_dropped = grid.num_experts - min(num_kept or 2 * grid.top_k, grid.num_experts)

    def on_use(self, indices: Sequence[int]) -> None:
        """Uses are known from the gates."""

    def on_step(self, step: StepSignal) -> None:
        self._before = self._scores.copy()

    def on_step_broken(self) -> None:
        self._scores[:] = self._before

    def on_gate(self, gate: GateSignal) -> None:
        least_kept = np.partition(gate.probs, self._num_dropped, axis=1)[:, self._num_dropped, None]
        kept = np.where(gate.probs >= least_kept, gate.probs, 0)
        row = self._scores[gate.row]
        row *= 1 - self._alpha
        row += (self._alpha / len(kept)) * kept.sum(axis=0)

    def scores(self) -> np.ndarray:
        return self._scores.reshape(-1)
