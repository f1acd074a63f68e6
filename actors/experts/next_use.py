"""When is every expert used next: one estimate from all signals, learned online, for eviction and prefetch alike.

Two linear models on the same features of a sequence, for every expert:
  soon:  q = P(used in the step that begins). That step's token is known, so its embedding speaks for every layer.
  worth: y = E[discount ^ (D - 1)], D = steps from the present one to the next use. Its label comes steps later; it is
         learned without waiting, by temporal differences (Sutton 1988): the target is u + (1 - u) * discount * y', u
         whether the following step used the expert and y' the estimate made there.
Features: the embedding of the present token, its average over the text (popularity given the meaning), and per layer
the log of the present gate probabilities and of their fast and slow averages (recency and gate mass). The bias is
popularity. Sequences are taken as independent: their hazards merge as 1 - prod(1 - h).

Knows signals; knows no memory and no link. Gates are only stored until somebody asks; learning is one batch over all
layers at the end of a step in which somebody asked, so nothing of it is spent where everything is resident.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, P projected dim, X embedding features (2 P), A moving
averages, G gate features of a layer ((1 + A) E).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np

from actors.experts.linear_head import LearningRates, LinearHead
from actors.experts.signals import GateSignal, Grid, Silent, StepSignal

_EMBEDDING_NORM = 4.0
_FLOOR = 0.3  # of a uniform gate probability; below it differences mean little
_EDGE = 1e-6


@dataclass(frozen=True, slots=True)
class NextUseSettings:
    """Chosen on a validation part of traces.

    discount: gamma, per step. projected_dim: longer embeddings are projected at random, by seed. embedding_average,
    gate_averages: weight of a token in the moving averages. rates: common features are those of embeddings.
    """

    discount: float = 0.7
    projected_dim: int = 128
    embedding_average: float = 0.15
    gate_averages: tuple[float, ...] = (0.3, 0.06)
    rates: LearningRates = field(default_factory=LearningRates)
    seed: int = 0


@dataclass(slots=True)
class _Context:
    """What is known of sequences after a step. First axis S, or none for one sequence.

    topic: [S, P] average embedding. averages: [S, A, L, E] of gate probabilities. Features made of these and of the
    step itself: embedded [S, X] and gates [S, L, G]. All zero for a sequence of which nothing is known.
    """

    topic: np.ndarray
    averages: np.ndarray
    embedded: np.ndarray
    gates: np.ndarray


class _Step:
    """A step under way: what was heard of it, and what was made of it for who asked."""

    def __init__(self, signal: StepSignal, grid: Grid, before: _Context, after: _Context, shares: np.ndarray) -> None:
        shape = (len(signal.sequences), grid.num_layers, grid.num_experts)
        self.signal = signal
        self.row = -1
        self.probs = np.zeros(shape, np.float32)
        self.used = np.zeros(shape, np.bool_)
        self.before = before
        self.after = after  # topic and embedded; the rest follows at the end
        self.shares = shares  # [S, A, 1, 1], of the step in the averages of gates
        self.asked: _Asked | None = None


@dataclass(slots=True)
class _Asked:
    """soon, past: [S, L, E], q of the step and y before it. merged_soon, merged: [L, E], q and worth over sequences.

    merged holds what is known after the gates up to merged_row.
    """

    soon: np.ndarray
    past: np.ndarray
    merged_soon: np.ndarray
    merged: np.ndarray
    merged_row: int = -1


class NextUse(Silent):
    """Follows all sequences and values every expert."""

    def __init__(self, grid: Grid, *, embedding_dim: int, settings: NextUseSettings = NextUseSettings()) -> None:
        self._grid, self._settings = grid, settings
        dim = min(settings.projected_dim, embedding_dim)
        self._projection: np.ndarray | None = None
        if dim < embedding_dim:
            normal = np.random.default_rng(settings.seed).standard_normal((embedding_dim, dim))
            self._projection = (normal / np.sqrt(dim)).astype(np.float32)
        self._weights = np.array([settings.embedding_average, *settings.gate_averages], np.float32)
        num_own = len(self._weights) * grid.num_experts
        self._soon = LinearHead(grid, 2 * dim, num_own, settings.rates)
        self._worth = LinearHead(grid, 2 * dim, num_own, settings.rates)
        self._unknown = _Context(
            np.zeros(dim, np.float32),
            np.zeros((len(settings.gate_averages), grid.num_layers, grid.num_experts), np.float32),
            np.zeros(2 * dim, np.float32),
            np.zeros((grid.num_layers, num_own), np.float32),
        )
        self._contexts: dict[int, _Context] = {}
        self._step: _Step | None = None
        layer = np.arange(grid.num_layers)
        layers_ahead = (layer[None] - layer[:, None] - 1) % grid.num_layers + 1
        self._nearness = (settings.discount ** (layers_ahead / grid.num_layers)).astype(np.float32)
        self._values = np.zeros((grid.num_layers, grid.num_experts), np.float32)

    @property
    def num_sequences(self) -> int:
        """Sequences of which something is kept."""
        return len(self._contexts)

    def on_step(self, step: StepSignal) -> None:
        known = [self._contexts.get(sequence, self._unknown) for sequence in step.sequences]
        before = _Context(
            *(np.stack([getattr(c, part) for c in known]) for part in ("topic", "averages", "embedded", "gates"))
        )
        vectors = step.embeddings if self._projection is None else step.embeddings @ self._projection
        vectors = vectors * (_EMBEDDING_NORM / (np.linalg.norm(vectors, axis=1, keepdims=True) + _EDGE))
        shares = self._shares(step)
        topic = before.topic + shares[:, :1] * (vectors - before.topic)
        after = _Context(topic, before.averages, np.concatenate([vectors, topic], axis=1), before.gates)
        self._step = _Step(step, self._grid, before, after, shares[:, 1:, None, None])

    def on_gate(self, gate: GateSignal) -> None:
        step = self._present
        step.row = gate.row
        step.probs[:, gate.row] = gate.probs
        step.used[:, gate.row] = gate.counts > 0

    def on_step_end(self) -> None:
        step = self._present
        after = step.after
        after.averages, after.gates = self._gate_features(step, slice(None))
        if step.asked is not None:
            self._learn(step, step.asked)
        for i, sequence in enumerate(step.signal.sequences):
            self._contexts[sequence] = _Context(after.topic[i], after.averages[i], after.embedded[i], after.gates[i])
        self._step = None

    def on_sequence_end(self, sequence: int) -> None:
        self._contexts.pop(sequence, None)

    def ask(self) -> None:
        """Make the step under way one to learn from, as asking for values does."""
        self._ask(self._present)

    def soon(self) -> np.ndarray:
        """[S, L, E] probability that a token of a sequence uses an expert in this step, as known at its begin."""
        return self._ask(self._present).soon

    def hazards(self) -> np.ndarray:
        """[L, E] probability that an expert is used at the next pass of its layer, sequences merged.

        Of layers to come that is in this step, of those passed in the next one.
        """
        step = self._present
        self.values()
        asked = self._ask(step)
        hazards = _hazard(asked.merged, self._settings.discount)
        hazards[step.row + 1 :] = asked.merged_soon[step.row + 1 :]
        return hazards

    def values(self) -> np.ndarray:
        """[L * E] expected discount ^ steps to the next use, seen from the present layer; a live view.

        Between steps it is what it was at the end of the last one.
        """
        step = self._step
        if step is not None:
            asked = self._ask(step)
            for row in range(asked.merged_row + 1, step.row + 1):
                _, own = self._gate_features(step, slice(row, row + 1))
                asked.merged[row] = self._merge(self._worth.predict_row(row, step.after.embedded, own[:, 0]))
            asked.merged_row = step.row
            np.multiply(asked.merged, self._nearness[step.row][:, None], out=self._values)
        return self._values.reshape(-1)

    @property
    def _present(self) -> _Step:
        assert self._step is not None, "between on_step and on_step_end"
        return self._step

    def _ask(self, step: _Step) -> _Asked:
        if step.asked is None:
            own = step.before.gates
            soon = self._soon.predict(step.after.embedded, own)
            past = self._worth.predict(step.before.embedded, own)
            in_rows = 1 - (1 - soon) ** step.signal.num_rows[:, None, None]
            merged = self._merge(in_rows + (1 - in_rows) * self._settings.discount * past)
            step.asked = _Asked(soon, past, 1 - (1 - in_rows).prod(axis=0), merged)
        return step.asked

    def _merge(self, worth: np.ndarray) -> np.ndarray:
        """[...] of all sequences from [S, ...]: of constant hazards h, worth = h / (1 - discount * (1 - h))."""
        if len(worth) == 1:
            return worth[0]
        discount = self._settings.discount
        merged = 1 - (1 - _hazard(worth, discount)).prod(axis=0)
        return merged / (1 - discount * (1 - merged))

    def _gate_features(self, step: _Step, rows: slice) -> tuple[np.ndarray, np.ndarray]:
        """Averages [S, A, rows, E] after the step, and features [S, rows, G]."""
        probs, averages = step.probs[:, None, rows], step.before.averages[:, :, rows]
        averages = averages + step.shares * (probs - averages)
        num_experts = self._grid.num_experts
        parts = np.log(np.concatenate([probs, averages], axis=1) * num_experts + _FLOOR)
        return averages, parts.swapaxes(1, 2).reshape(len(probs), probs.shape[2], -1)

    def _shares(self, signal: StepSignal) -> np.ndarray:
        """[S, 1 + A]: weight of a step in the average of embeddings and those of gates; the first has all."""
        is_new = np.array([sequence not in self._contexts for sequence in signal.sequences])
        shares = 1 - (1 - self._weights) ** signal.num_rows[:, None]
        return np.where(is_new[:, None], 1, shares).astype(np.float32)

    def _learn(self, step: _Step, asked: _Asked) -> None:
        """Steps of one token teach; the mean over a prompt's tokens would not."""
        signal, before, after = step.signal, step.before, step.after
        known = [sequence in self._contexts for sequence in signal.sequences]
        rows = np.flatnonzero(signal.is_decode & np.array(known))
        if not len(rows):
            return
        own, used = before.gates[rows], step.used[rows]
        following = self._worth.predict(after.embedded[rows], after.gates[rows])
        target = np.where(used, 1, self._settings.discount * following)
        self._worth.learn(before.embedded[rows], own, target - asked.past[rows])
        self._soon.learn(after.embedded[rows], own, used - asked.soon[rows])


def _hazard(worth: np.ndarray, discount: float) -> np.ndarray:
    """Of worth = sum over D of discount ^ (D - 1) * h * (1 - h) ^ (D - 1)."""
    return worth * (1 - discount) / (1 - discount * worth)
