"""What the engine tells policies and predictors as it computes: steps, gates, ends of sequences.

Pure values; knows no tensors, no clock. A step has one entry per sequence, whatever its rows: a prefill chunk is the
mean over its tokens, so that a long prompt weighs no more than one decode step. Padding never enters.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from cluster.types import ExpertId


@dataclass(frozen=True, slots=True)
class Grid:
    """The experts of a model as a table: row i is decoder layer `layers[i]`; flat index = row * num_experts + e."""

    layers: tuple[int, ...]
    num_experts: int
    top_k: int

    @property
    def num_layers(self) -> int:
        return len(self.layers)

    @property
    def size(self) -> int:
        """Experts in all."""
        return len(self.layers) * self.num_experts

    def flat(self, expert: ExpertId) -> int:
        """Index of an expert."""
        return self.layers.index(expert.layer) * self.num_experts + expert.expert

    def expert(self, index: int) -> ExpertId:
        """The expert at an index."""
        row, expert = divmod(index, self.num_experts)
        return ExpertId(self.layers[row], expert)


@dataclass(frozen=True, slots=True)
class StepSignal:
    """A forward step begins.

    sequences: [S], who is in it. embeddings: [S, D] float32, mean input embedding of the tokens to be computed, known
    before the first layer. num_rows: [S] tokens of each. is_decode: [S] bool.
    """

    sequences: tuple[int, ...]
    embeddings: np.ndarray
    num_rows: np.ndarray
    is_decode: np.ndarray

    def sound(self) -> StepSignal:
        """The same, a sequence whose embedding is not finite without one: it fails at its first gate."""
        bad = _unsound_rows(self.embeddings)
        return replace(self, embeddings=np.where(bad[:, None], 0, self.embeddings)) if bad.any() else self


@dataclass(frozen=True, slots=True)
class GateSignal:
    """A gate has spoken, its experts were not computed yet.

    row: of the layer in the grid. probs: [S, E] float32, mean gate probability per sequence. counts: [S, E] float32,
    tokens that chose an expert. ahead: [S, E] or None: mean probability that the next layer's gate gives to the input
    of this one (mixtral-offloading's and HybriMoE's signal; costs one product with the next gate).
    """

    row: int
    probs: np.ndarray
    counts: np.ndarray
    ahead: np.ndarray | None

    def sound(self) -> GateSignal:
        """The same, without what is not finite: nothing of it is heard, of the others everything.

        The engine lets no such row come so far; a matrix of the next gate may make one of finite ones.
        """
        bad = _unsound_rows(self.probs)
        no_ahead = self.ahead is not None and not np.isfinite(self.ahead).all()
        if not bad.any() and not no_ahead:
            return self
        probs, counts = (np.where(bad[:, None], 0, values) for values in (self.probs, self.counts))
        return GateSignal(self.row, probs, counts, None if no_ahead else self.ahead)


def _unsound_rows(values_SX: np.ndarray) -> np.ndarray:
    """[S] bool: which rows are not finite."""
    return np.asarray(~np.isfinite(values_SX).all(axis=1))


class SignalListener(Protocol):
    """Told in this order: on_step, on_gate for each row ascending, on_step_end; on_sequence_end at any time between.

    Or on_step_broken in the place of on_step_end, after any of the gates. What comes is finite.
    """

    def on_step(self, step: StepSignal) -> None:
        """A step begins."""
        ...

    def on_gate(self, gate: GateSignal) -> None:
        """A gate of the step has spoken."""
        ...

    def on_step_end(self) -> None:
        """All layers are done."""
        ...

    def on_step_broken(self) -> None:
        """The step broke off and comes again: what was heard since on_step is to be forgotten."""
        ...

    def on_sequence_end(self, sequence: int) -> None:
        """A sequence is over; whatever is kept of it is to be freed."""
        ...


class Silent:
    """Listens to nothing: what listeners derive from to override what they need."""

    def on_step(self, step: StepSignal) -> None:
        """Ignored."""

    def on_gate(self, gate: GateSignal) -> None:
        """Ignored."""

    def on_step_end(self) -> None:
        """Ignored."""

    def on_step_broken(self) -> None:
        """Ignored."""

    def on_sequence_end(self, sequence: int) -> None:
        """Ignored."""
