"""Settings of the estimate of the next use."""

from __future__ import annotations

from dataclasses import dataclass, field

from cluster.policies.next_use.heads import LearningRates


@dataclass(frozen=True, slots=True)
class NextUseSettings:
    """Chosen on the validation part of recorded traces.

    discount: gamma, per step, 0 to 1. How much less a use counts that comes one step later.
    projected_dim: longer embeddings are projected to so many numbers, at random, by `seed`.
    embedding_average, gate_averages: weight of one token in the moving averages, 0 to 1. There are as many averages of
    gates as weights.
    reach: layers ahead of which a gate speaks.
    weights_per_step: weights that one step may correct. Of a model with more, layers take turns in learning.
    rates: of the two heads. Their common features are those of embeddings.
    """

    discount: float = 0.7
    projected_dim: int = 128
    embedding_average: float = 0.15
    gate_averages: tuple[float, ...] = (0.3, 0.06)
    reach: int = 3
    weights_per_step: int = 2_000_000
    rates: LearningRates = field(default_factory=LearningRates)
    seed: int = 0

    def dim(self, embedding_dim: int) -> int:
        """P: numbers of an embedding that the models see."""
        return min(self.projected_dim, embedding_dim)
