"""A step that NextUse follows: what was known of its sequences, what was heard, what is expected of it.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, P projected dim, X = 2 P embedding features, A moving
averages, C = 2 + A kinds of share, G = (1 + A) E gate features, R reach, V = 3 votes of a blend (W = 5 of the
trajectory). All float32 unless said.

A share is a gate probability over the uniform one, 1 / E, plus a floor. Of each expert of a layer there are C shares:
that of the gate ahead, that of the gate itself, and the A moving averages of the latter.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.policies.next_use.kernels import StepAddresses
from cluster.policies.signals import GateSignal, Grid, StepSignal

_FLOOR = 0.3  # below it differences mean little


@dataclass(slots=True, kw_only=True)
class Context:
    """What is known of sequences after a step. The first axis is S; it is left out for one sequence alone.

    topic: [S, P], moving average of embeddings.
    averages: [S, L, A, E], moving averages of shares.
    embedded: [S, X], features made of embeddings: of the last token, and the topic.
    gates: [S, L, G], features made of gates: logs of the last shares, and of the averages.
    worth: [S, L, E], log odds of worth, as the head for worth gives them.
    All are zero for a sequence of which nothing is known, but worth, which is the head's bias.
    """

    topic: np.ndarray
    averages: np.ndarray
    embedded: np.ndarray
    gates: np.ndarray
    worth: np.ndarray


class StepUnderWay:
    """A step under way: what was heard of it, and what was made of it for who asked.

    signal: with which it began. num_rows: [S, 1, 1], tokens of each sequence.
    before, after: contexts. Of `after` topic and embedded are known at the begin, the rest at the end.
    row: of the last gate that spoke, -1 before the first. heard: gates that are not in the arrays yet.
    gates: [S, L, C, E], shares. logs: [S, L, C, E], their logarithms, of the rows up to `featured`.
    used: [S, L, E] bool, experts chosen.
    shares: [S, 1, A, 1], weight of this step in the averages. kept: [S, L, A, E], what the averages keep of before.
    expected: None as long as nobody asked.
    """

    def __init__(self, signal: StepSignal, grid: Grid, before: Context, after: Context, shares_SA: np.ndarray) -> None:
        """Args: shares_SA: weight of the step in the averages of gates."""
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
        self.after = after
        self.expected: Expected | None = None
        self.shares = np.ascontiguousarray(shares_SA)[:, None, :, None]
        self.kept = (1 - self.shares) * before.averages

    def add_gate(self, gate: GateSignal) -> None:
        """A gate has spoken. It is only stored."""
        self.row = gate.row
        self.heard.append(gate)

    def add_features(self, stop: int) -> None:
        """Bring gates, logs and used up to date, of the rows before `stop`."""
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


@dataclass(slots=True, kw_only=True)
class Expected:
    """What a step is expected to use, and what is used after it. Votes are log odds to be blended.

    soon_votes, soon: of q, the probability that this step uses an expert, as known at its begin.
    past_votes, past: of y, the worth of an expert before this step.
    worth_votes: of y after this step. Whole for the rows that were passed.
    ahead_votes: of q of the next layers, see Trajectory.
    hazards, worth: q and y over all sequences, as known after the gates up to `row`.
    packed: all this for compiled code, once it was needed.
    """

    soon_votes_SLVE: np.ndarray
    past_votes_SLVE: np.ndarray
    worth_votes_SLVE: np.ndarray
    ahead_votes_SLRWE: np.ndarray
    soon_SLE: np.ndarray
    past_SLE: np.ndarray
    hazards_LE: np.ndarray
    worth_LE: np.ndarray
    row: int = -1
    packed: StepAddresses | None = None


def votes_of(popular_LE: np.ndarray) -> np.ndarray:
    """Votes [1, L, V, E]: the constant 1, room for a model, and popularity, given as log odds."""
    return np.stack([np.ones_like(popular_LE), np.zeros_like(popular_LE), popular_LE], axis=1)[None]


def with_model(votes: np.ndarray, model_SLE: np.ndarray) -> np.ndarray:
    """Votes [S, L, V, E]: those of votes_of, with a model's log odds."""
    votes = votes.repeat(len(model_SLE), axis=0)
    votes[:, :, 1] = model_SLE
    return votes


def join_contexts(contexts: Sequence[Context]) -> Context:
    """One for all sequences, from one for each."""
    names = ("topic", "averages", "embedded", "gates", "worth")
    if len(contexts) == 1:
        return Context(**{name: getattr(contexts[0], name)[None] for name in names})
    return Context(**{name: np.stack([getattr(context, name) for context in contexts]) for name in names})
