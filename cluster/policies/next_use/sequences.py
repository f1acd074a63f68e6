"""What NextUse knows of each running sequence, and what a step adds to it.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, D model dim, P projected dim, X = 2 P embedding
features, A moving averages, G = (1 + A) E gate features. All float32.
"""

from __future__ import annotations

import numpy as np

from cluster.policies.next_use.settings import NextUseSettings
from cluster.policies.next_use.step import Context, StepUnderWay, join_contexts
from cluster.policies.signals import Grid, StepSignal

_EMBEDDING_NORM = 4.0
_EDGE = 1e-6


class SequenceContexts:
    """A Context for each running sequence; unknown sequences get one that says nothing."""

    def __init__(self, grid: Grid, embedding_dim: int, settings: NextUseSettings, worth_LE: np.ndarray) -> None:
        """Args: embedding_dim: D. worth_LE: what is expected of an unknown sequence; a live view."""
        self._grid, dim = grid, settings.dim(embedding_dim)
        self._projection_DP: np.ndarray | None = None
        if dim < embedding_dim:
            normal = np.random.default_rng(settings.seed).standard_normal((embedding_dim, dim))
            self._projection_DP = (normal / np.sqrt(dim)).astype(np.float32)
        self._weights = np.array([settings.embedding_average, *settings.gate_averages], np.float32)  # [1 + A]
        num_averages = len(settings.gate_averages)
        self._unknown = Context(
            topic=np.zeros(dim, np.float32),
            averages=np.zeros((grid.num_layers, num_averages, grid.num_experts), np.float32),
            embedded=np.zeros(2 * dim, np.float32),
            gates=np.zeros((grid.num_layers, (1 + num_averages) * grid.num_experts), np.float32),
            worth=worth_LE,
        )
        self._contexts: dict[int, Context] = {}

    def __len__(self) -> int:
        return len(self._contexts)

    def begin_step(self, signal: StepSignal) -> StepUnderWay:
        """The step that a signal begins. Contexts stay as they are until end_step."""
        before = join_contexts([self._contexts.get(sequence, self._unknown) for sequence in signal.sequences])
        vectors = signal.embeddings if self._projection_DP is None else signal.embeddings @ self._projection_DP
        vectors = vectors * (_EMBEDDING_NORM / (np.sqrt(np.square(vectors).sum(axis=1, keepdims=True)) + _EDGE))
        shares = self._shares(signal)
        topic = before.topic + shares[:, :1] * (vectors - before.topic)
        after = Context(
            topic=topic,
            averages=before.averages,
            embedded=np.concatenate([vectors, topic], axis=1),
            gates=before.gates,
            worth=before.worth,
        )
        return StepUnderWay(signal, self._grid, before, after, shares[:, 1:])

    def end_step(self, step: StepUnderWay) -> None:
        """Keep what is known after a step. Its features are complete."""
        after, expected = step.after, step.expected
        after.averages = step.gates[:, :, 2:]
        after.gates = np.ascontiguousarray(step.logs[:, :, 1:]).reshape(len(step.gates), self._grid.num_layers, -1)
        if expected is None:
            after.worth = np.broadcast_to(self._unknown.worth, step.used.shape)
        else:
            after.worth = expected.worth_votes_SLVE[:, :, 1]
        for i, sequence in enumerate(step.signal.sequences):
            self._contexts[sequence] = Context(
                topic=after.topic[i],
                averages=after.averages[i],
                embedded=after.embedded[i],
                gates=after.gates[i],
                worth=after.worth[i],
            )

    def forget(self, sequence: int) -> None:
        """A sequence is over; one that is unknown may be."""
        self._contexts.pop(sequence, None)

    def _shares(self, signal: StepSignal) -> np.ndarray:
        """[S, 1 + A]: weight of a step in the average of embeddings and in those of gates; the first step has all."""
        is_new = np.array([sequence not in self._contexts for sequence in signal.sequences])
        shares = 1 - (1 - self._weights) ** signal.num_rows[:, None]
        return np.where(is_new[:, None], 1, shares).astype(np.float32)
