"""What the engine tells policies and predictors as it computes: steps, gates, ends of sequences.

Pure values; knows no tensors, no clock. A step has one entry per sequence, whatever its rows: a prefill chunk is the
mean over its tokens, so that a long prompt weighs no more than one decode step. Padding never enters.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, D model dim.
"""

from __future__ import annotations

from dataclasses import dataclass
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


class SignalListener(Protocol):
    """Told in this order: on_step, on_gate for each row ascending, on_step_end; on_sequence_end at any time between."""

    def on_step(self, step: StepSignal) -> None:
        """A step begins."""
        ...

    def on_gate(self, gate: GateSignal) -> None:
        """A gate of the step has spoken."""
        ...

    def on_step_end(self) -> None:
        """All layers are done."""
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

    def on_sequence_end(self, sequence: int) -> None:
        """Ignored."""
