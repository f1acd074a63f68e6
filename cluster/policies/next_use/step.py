"""A step that NextUse follows: what was known of its sequences, what was heard, what is expected of it.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, P projected dim, X embedding features (2 P), A moving
averages, G gate features of a layer ((1 + A) E).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.policies.next_use.kernels import StepArrays
from cluster.policies.signals import GateSignal, Grid, StepSignal

_FLOOR = 0.3  # of a uniform gate probability; below it differences mean little


@dataclass(slots=True)
class Context:
    """What is known of sequences after a step. First axis S, or none for one sequence.

    topic: [S, P] average embedding. averages: [S, L, A, E] of gates, as in StepUnderWay. Features made of these and
    of the step itself: embedded [S, X] and gates [S, L, G]. worth: [S, L, E], log odds of y by the head. Zero for a
    sequence of which nothing is known.
    """

    topic: np.ndarray
    averages: np.ndarray
    embedded: np.ndarray
    gates: np.ndarray
    worth: np.ndarray


class StepUnderWay:
    """A step under way: what was heard of it, and what was made of it for who asked.

    heard: gates that are not in the arrays yet, up to `row`.
    gates: [S, L, 2 + A, E]: ahead, probabilities, averages after the step, all as shares of a uniform probability and
    with a floor added (of which averages are averages again); logs: their logarithms, the features, of the rows up to
    `featured`. An average is shares [S, 1, A, 1] of the present gate and what is kept of the one before, kept
    [S, L, A, E].
    """

    def __init__(self, signal: StepSignal, grid: Grid, before: Context, after: Context, shares: np.ndarray) -> None:
        """Args: shares: [S, A], of the step in the averages of gates."""
        num_averages = before.averages.shape[2]
        shape = (len(signal.sequences), grid.num_layers, 2 + num_averages, grid.num_experts)
        self.signal = signal
        self.num_rows = signal.num_rows.astype(np.float32)[:, None, None]
        self.row = self.featured = -1
        self.heard: list[GateSignal] = []
        self.gates = np.full(shape, _FLOOR, np.float32)
        self.logs = np.empty(shape, np.float32)
        self.used = np.zeros((shape[0], shape[1], shape[3]), np.bool_)
        self.before = before
        self.after = after  # topic and embedded; the rest follows at the end
        self.expected: Expected | None = None
        self.shares = np.ascontiguousarray(shares)[:, None, :, None]
        self.kept = (1 - self.shares) * before.averages

    def hear(self, gate: GateSignal) -> None:
        """A gate has spoken."""
        self.row = gate.row
        self.heard.append(gate)

    def add_features(self, stop: int) -> None:
        """Of the rows before `stop`."""
        for gate in self.heard:
            gates = self.gates[:, gate.row]
            if gate.ahead is not None:
                gates[:, 0] += gate.ahead * np.float32(gates.shape[-1])
            gates[:, 1] += gate.probs * np.float32(gates.shape[-1])
            np.greater(gate.counts, 0, out=self.used[:, gate.row])
        self.heard.clear()
        rows = slice(self.featured + 1, stop)
        gates = self.gates[:, rows]
        np.multiply(self.shares, gates[:, :, 1:2], out=gates[:, :, 2:])
        gates[:, :, 2:] += self.kept[:, rows]
        np.log(gates, out=self.logs[:, rows])
        self.featured = stop - 1


@dataclass(slots=True)
class Expected:
    """What a step is expected to use, and what is used after it.

    Parts are log odds to be blended: of a constant, a model, and popularity. soon_parts, past_parts: [S, L, 3, E], of
    q and of y before the step; soon, past: [S, L, E], what came of them. worth_parts: [S, L, 3, E], of y after the
    step, whole for rows passed. ahead_parts: [S, L, R, 5, E], see Trajectory. hazards, worth: [L, E], q and y over all
    sequences, as known after the gates up to row. arrays: all this for the compiled kernels, once they were needed.
    """

    soon_parts: np.ndarray
    past_parts: np.ndarray
    worth_parts: np.ndarray
    ahead_parts: np.ndarray
    soon: np.ndarray
    past: np.ndarray
    hazards: np.ndarray
    worth: np.ndarray
    row: int = -1
    arrays: StepArrays | None = None


def parts_of(popular: np.ndarray) -> np.ndarray:
    """[1, L, 3, E] from log odds [L, E], with room for what a model says."""
    return np.stack([np.ones_like(popular), np.zeros_like(popular), popular], axis=1)[None]


def with_model(parts: np.ndarray, model: np.ndarray) -> np.ndarray:
    """[S, L, 3, E] from those and log odds [S, L, E]."""
    parts = parts.repeat(len(model), axis=0)
    parts[:, :, 1] = model
    return parts


def join(contexts: Sequence[Context]) -> Context:
    parts = ("topic", "averages", "embedded", "gates", "worth")
    if len(contexts) == 1:
        return Context(*(getattr(contexts[0], part)[None] for part in parts))
    return Context(*(np.stack([getattr(context, part) for context in contexts]) for part in parts))
