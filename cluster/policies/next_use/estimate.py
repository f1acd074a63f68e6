"""When is every expert used next: one estimate from all signals, learned online, for eviction and prefetch alike.

Three models of a sequence, for every expert:
  soon:  q = P(used in the step that begins). That step's token is known, so its embedding speaks for every layer.
  trajectory: q of the next layers, once more after every gate of the step.
  worth: y = E[discount ^ (D - 1)], D = steps from the present one to the next use. Its label comes steps later; it is
         learned without waiting, by temporal differences (Sutton 1988): the target is u + (1 - u) * discount * y', u
         whether the following step used the expert and y' the estimate made there.
Features: the embedding of the present token, its average over the text (popularity given the meaning), and per layer
the log of the present gate probabilities and of their fast and slow averages (recency and gate mass). Each is blended
with plain popularity by how well both did of late: where nothing can be known, popularity is what remains.
Sequences are taken as independent: their hazards merge as 1 - prod(1 - h).

Knows signals; knows no memory and no link. Gates are only stored until somebody asks; learning is one batch over all
layers at the end of a step in which somebody asked, so nothing of it is spent where everything is resident.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, P projected dim, X embedding features (2 P), A moving
averages, G gate features of a layer ((1 + A) E).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.policies.learned_state import NUM_LEARNED
from cluster.policies.next_use import trajectory
from cluster.policies.next_use.heads import Blend, LearningRates, LinearHead, log_odds, sigmoid
from cluster.policies.next_use.kernels import NextUseKernels, StepArrays
from cluster.policies.next_use.step import Context, Expected, StepUnderWay, join, parts_of, with_model
from cluster.policies.next_use.trajectory import Trajectory
from cluster.policies.signals import GateSignal, Grid, Silent, StepSignal
from cluster.policies.state_average import average_in

_EMBEDDING_NORM = 4.0
_EDGE = 1e-6
_BLEND_RATE = 0.02
_POPULARITY_RATE = 0.002
_POPULARITY_EVERY = 16  # steps: it changes slowly
_PRIOR_STEPS = 50


@dataclass(frozen=True, slots=True)
class NextUseSettings:
    """Chosen on a validation part of traces.

    discount: gamma, per step. projected_dim: longer embeddings are projected at random, by seed. embedding_average,
    gate_averages: weight of a token in the moving averages. reach: layers ahead of which a gate speaks.
    weights_per_step: of more, layers take turns in learning, which bounds its cost. rates: common features are those of
    embeddings.
    """

    discount: float = 0.7
    projected_dim: int = 128
    embedding_average: float = 0.15
    gate_averages: tuple[float, ...] = (0.3, 0.06)
    reach: int = 3
    weights_per_step: int = 2_000_000
    rates: LearningRates = field(default_factory=LearningRates)
    seed: int = 0


class NextUse(Silent):
    """Follows all sequences and values every expert."""

    def __init__(
        self,
        grid: Grid,
        *,
        embedding_dim: int,
        settings: NextUseSettings = NextUseSettings(),
        kernels: NextUseKernels | None = None,
    ) -> None:
        """Args: kernels: None: all of it in numpy, several times slower."""
        self._grid, self._settings, self._kernels = grid, settings, kernels
        dim = min(settings.projected_dim, embedding_dim)
        self._projection: np.ndarray | None = None
        if dim < embedding_dim:
            normal = np.random.default_rng(settings.seed).standard_normal((embedding_dim, dim))
            self._projection = (normal / np.sqrt(dim)).astype(np.float32)
        self._weights = np.array([settings.embedding_average, *settings.gate_averages], np.float32)
        num_averages, shape = len(settings.gate_averages), (grid.num_layers, grid.num_experts)
        num_own = (1 + num_averages) * grid.num_experts
        self._soon = LinearHead(grid, 2 * dim, num_own, settings.rates)
        self._worth = LinearHead(grid, 2 * dim, num_own, settings.rates)
        self._soon_blend, self._worth_blend = (
            Blend((grid.num_layers,), (0.0, 1.0, 0.0), rate=_BLEND_RATE) for _ in range(2)
        )
        self._trajectory = Trajectory(grid, settings.reach)
        self._popularity = np.full(shape, grid.top_k / grid.num_experts, np.float32)
        self._num_learned = self._num_steps = 0
        num_weights = self._soon.num_weights + self._worth.num_weights + self._trajectory.num_weights
        self._num_turns = min(-(-num_weights // settings.weights_per_step), grid.num_layers)
        self._notice_popularity()
        self._unknown = Context(
            np.zeros(dim, np.float32),
            np.zeros((grid.num_layers, num_averages, grid.num_experts), np.float32),
            np.zeros(2 * dim, np.float32),
            np.zeros((grid.num_layers, num_own), np.float32),
            self._worth.arrays["bias"],
        )
        self._contexts: dict[int, Context] = {}
        self._valued: set[int] = set()  # sequences of which somebody asked in their last step
        self._step: StepUnderWay | None = None
        layer = np.arange(grid.num_layers)
        layers_ahead = (layer[None] - layer[:, None] - 1) % grid.num_layers + 1
        self._nearness = (settings.discount ** (layers_ahead / grid.num_layers)).astype(np.float32)
        self._values = np.zeros(shape, np.float32)

    @property
    def num_sequences(self) -> int:
        """Sequences of which something is kept."""
        return len(self._contexts)

    def on_step(self, step: StepSignal) -> None:
        before = join([self._contexts.get(sequence, self._unknown) for sequence in step.sequences])
        vectors = step.embeddings if self._projection is None else step.embeddings @ self._projection
        vectors = vectors * (_EMBEDDING_NORM / (np.sqrt(np.square(vectors).sum(axis=1, keepdims=True)) + _EDGE))
        shares = self._shares(step)
        topic = before.topic + shares[:, :1] * (vectors - before.topic)
        embedded = np.concatenate([vectors, topic], axis=1)
        after = Context(topic, before.averages, embedded, before.gates, before.worth)
        self._step = StepUnderWay(step, self._grid, before, after, shares[:, 1:])

    def on_gate(self, gate: GateSignal) -> None:
        self._present.hear(gate)

    def on_step_end(self) -> None:
        step = self._present
        after = step.after
        if step.expected is not None:
            self._catch_up(step, step.expected)
        step.add_features(self._grid.num_layers)
        after.averages = step.gates[:, :, 2:]
        after.gates = np.ascontiguousarray(step.logs[:, :, 1:]).reshape(len(step.gates), self._grid.num_layers, -1)
        if step.expected is not None:
            self._learn(step, step.expected)
            self._valued.update(step.signal.sequences)
            after.worth = step.expected.worth_parts[:, :, 1]
        else:
            self._valued.difference_update(step.signal.sequences)
            after.worth = np.broadcast_to(self._unknown.worth, step.used.shape)
        for i, sequence in enumerate(step.signal.sequences):
            self._contexts[sequence] = Context(
                after.topic[i], after.averages[i], after.embedded[i], after.gates[i], after.worth[i]
            )
        self._step = None

    def on_step_broken(self) -> None:
        self._step = None  # nothing is learned, and no context changed, before the end

    def on_sequence_end(self, sequence: int) -> None:
        self._contexts.pop(sequence, None)
        self._valued.discard(sequence)

    def ask(self) -> None:
        """Make the step under way one to learn from, as asking for values does."""
        self._ask(self._present)

    def soon(self) -> np.ndarray:
        """[S, L, E] probability that a token of a sequence uses an expert in this step, as known at its begin."""
        return self._ask(self._present).soon

    def hazards(self) -> np.ndarray:
        """[L, E] probability that an expert is used at the next pass of its layer, sequences merged; a live view.

        Of layers to come that is in this step, of those passed in the next one.
        """
        step = self._present
        return self._catch_up(step, self._ask(step)).hazards

    def values(self) -> np.ndarray:
        """[L * E] expected discount ^ steps to the next use, seen from the present layer; a live view.

        Between steps it is what it was at the end of the last one.
        """
        if self._step is not None:
            self._catch_up(self._step, self._ask(self._step))
        return self._values.reshape(-1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """A copy of all that was learned, and from how many steps of sequences."""
        return {NUM_LEARNED: np.array(self._num_learned)} | {name: a.copy() for name, a in self._arrays().items()}

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Average in what another one learned, by the steps that both learned from.

        Raises:
            ConfigError: fields are missing or of other shapes.
        """
        self._num_learned = average_in(self._arrays(), self._num_learned, arrays)
        self._notice_popularity()

    def _arrays(self) -> dict[str, np.ndarray]:
        parts = {
            "soon": self._soon,
            "soon_blend": self._soon_blend,
            "worth": self._worth,
            "worth_blend": self._worth_blend,
            "trajectory": self._trajectory,
        }
        fields = {f"{name}.{field}": a for name, part in parts.items() for field, a in part.arrays.items()}
        return {"popularity": self._popularity, **fields}

    @property
    def _present(self) -> StepUnderWay:
        assert self._step is not None, "between on_step and on_step_end"
        return self._step

    def _ask(self, step: StepUnderWay) -> Expected:
        if step.expected is None:
            discount = self._settings.discount
            popular, long_popular, ahead = self._popular
            base = self._soon.logits(step.after.embedded, step.before.gates)
            soon_parts, past_parts = with_model(popular, base), with_model(long_popular, step.before.worth)
            soon, past = sigmoid(self._soon_blend.logits(soon_parts)), sigmoid(self._worth_blend.logits(past_parts))
            unused = (1 - soon) ** step.num_rows
            step.expected = Expected(
                soon_parts,
                past_parts,
                with_model(long_popular, self._worth.common_logits(step.after.embedded)),
                self._trajectory.with_base(ahead, base),
                soon,
                past,
                1 - unused.prod(axis=0),
                self._merge(1 - unused * (1 - discount * past)),
            )
            self._value(step.expected.worth, step.expected.row)
        return step.expected

    def _catch_up(self, step: StepUnderWay, expected: Expected) -> Expected:
        """Take in the gates heard since the last time."""
        if expected.row == step.row:
            return expected
        if self._kernels is not None:
            if expected.arrays is None:
                expected.arrays = self._arrays_of(step, expected, self._kernels)
            self._kernels.follow(expected.arrays, step.heard)
            step.heard.clear()
            step.featured = step.row
        else:
            for row in range(expected.row + 1, step.row + 1):
                self._pass(step, expected, row)
            if step.row + 1 < self._grid.num_layers:
                self._look_ahead(step, expected, step.row)
            self._value(expected.worth, step.row)
        expected.row = step.row
        return expected

    def _value(self, worth: np.ndarray, row: int) -> None:
        np.multiply(worth, self._nearness[row][:, None], out=self._values)

    def _arrays_of(self, step: StepUnderWay, expected: Expected, kernels: NextUseKernels) -> StepArrays:
        num_sequences, num_layers, num_gates, num_experts = step.gates.shape
        sizes = {"S": num_sequences, "L": num_layers, "A": num_gates - 2, "E": num_experts, "R": self._trajectory.reach}
        arrays = {name: getattr(step, name) for name in ("num_rows", "shares", "kept", "gates", "logs", "used")}
        names = ("past", "worth_parts", "ahead_parts", "worth", "hazards")
        arrays |= {name: getattr(expected, name) for name in names}
        arrays |= {"nearness": self._nearness, "values": self._values}
        arrays |= {"of_own": self._worth.arrays["of_own"], "worth_blend": self._worth_blend.arrays["weights"]}
        models = self._trajectory.arrays
        arrays |= {"matrices": models["matrices"], "ahead_blend": models["weights"]}
        return kernels.pack_step(sizes, self._settings.discount, arrays)

    def _pass(self, step: StepUnderWay, expected: Expected, row: int) -> None:
        """The next use of a layer's experts is now in the next step."""
        step.add_features(row + 1)
        parts = expected.worth_parts[:, row]
        parts[:, 1] += self._worth.own_logits(row, step.logs[:, row, 1:].reshape(len(parts), -1))
        merged = self._merge(sigmoid(self._worth_blend.logits(parts, row)))
        expected.worth[row], expected.hazards[row] = merged, _hazard(merged, self._settings.discount)

    def _look_ahead(self, step: StepUnderWay, expected: Expected, row: int) -> None:
        logits = self._trajectory.logits(row, step.logs[:, row, :2], expected.ahead_parts)
        rows = slice(row + 1, row + 1 + logits.shape[1])
        unused = sigmoid(-logits) ** step.num_rows
        expected.worth[rows] = self._merge(1 - unused * (1 - self._settings.discount * expected.past[:, rows]))
        expected.hazards[rows] = 1 - unused.prod(axis=0)

    def _merge(self, worth: np.ndarray) -> np.ndarray:
        """[...] of all sequences from [S, ...]: of constant hazards h, worth = h / (1 - discount * (1 - h))."""
        if len(worth) == 1:
            return worth[0]
        discount = self._settings.discount
        return _worth_of(1 - (1 - _hazard(worth, discount)).prod(axis=0), discount)

    def _shares(self, signal: StepSignal) -> np.ndarray:
        """[S, 1 + A]: weight of a step in the average of embeddings and those of gates; the first has all."""
        is_new = np.array([sequence not in self._contexts for sequence in signal.sequences])
        shares = 1 - (1 - self._weights) ** signal.num_rows[:, None]
        return np.where(is_new[:, None], 1, shares).astype(np.float32)

    def _learn(self, step: StepUnderWay, expected: Expected) -> None:
        """Steps of one token teach; the mean over a prompt's tokens would not."""
        signal = step.signal
        known = [sequence in self._valued for sequence in signal.sequences]
        rows = np.flatnonzero(signal.is_decode & np.array(known))
        if not len(rows):
            return
        layers = slice(self._num_steps % self._num_turns, None, self._num_turns)
        if self._kernels is not None and expected.arrays is not None:
            self._kernels.learn(
                expected.arrays, self._rates, self._lesson(step, expected, rows), first=layers.start, turns=layers.step
            )
        else:
            self._learn_rows(step, expected, rows, layers)
        used = step.used[rows]
        self._num_learned += len(used)
        rate = max(_POPULARITY_RATE, 1 / (self._num_learned + _PRIOR_STEPS))
        self._popularity += rate * (used - self._popularity).sum(axis=0)
        self._num_steps += 1
        if self._num_steps % _POPULARITY_EVERY == 0:
            self._notice_popularity()

    def _learn_rows(self, step: StepUnderWay, expected: Expected, rows: np.ndarray, layers: slice) -> None:
        before, after = step.before, step.after
        own, used = before.gates[rows], step.used[rows]
        soon_parts, past_parts, worth_parts = (
            parts[rows] for parts in (expected.soon_parts, expected.past_parts, expected.worth_parts)
        )
        following = sigmoid(self._worth_blend.logits(worth_parts))
        target = np.where(used, np.float32(1), np.float32(self._settings.discount) * following)
        self._worth.learn(before.embedded[rows], own, target - sigmoid(past_parts[:, :, 1]), layers)
        self._worth_blend.learn(past_parts, target - expected.past[rows])
        self._soon.learn(after.embedded[rows], own, used - sigmoid(soon_parts[:, :, 1]), layers)
        self._soon_blend.learn(soon_parts, used - expected.soon[rows])
        self._trajectory.learn(step.logs[rows, :, :2], expected.ahead_parts[rows], used, layers)

    def _lesson(self, step: StepUnderWay, expected: Expected, rows: np.ndarray) -> dict[str, np.ndarray]:
        soon, worth = self._soon.arrays, self._worth.arrays
        return {
            "examples": rows,
            "embedded_before": step.before.embedded,
            "embedded_after": step.after.embedded,
            "gates_before": step.before.gates,
            "soon_parts": expected.soon_parts,
            "past_parts": expected.past_parts,
            "soon": expected.soon,
            "soon_bias": soon["bias"],
            "soon_of_common": soon["of_common"],
            "soon_of_own": soon["of_own"],
            "worth_bias": worth["bias"],
            "worth_of_common": worth["of_common"],
            "soon_blend": self._soon_blend.arrays["weights"],
        }

    @property
    def _rates(self) -> dict[str, float]:
        rates = self._settings.rates
        return {
            "bias_rate": rates.bias,
            "common_rate": rates.common,
            "own_rate": rates.own,
            "blend_rate": self._soon_blend.rate,
            "ahead_rate": trajectory.RATE,
            "ahead_blend_rate": trajectory.BLEND_RATE,
        }

    def _notice_popularity(self) -> None:
        popular = log_odds(self._popularity)
        long_popular = log_odds(_worth_of(self._popularity, self._settings.discount))
        self._popular = parts_of(popular), parts_of(long_popular), self._trajectory.parts(popular)


def _hazard(worth: np.ndarray, discount: float) -> np.ndarray:
    """Of worth = sum over D of discount ^ (D - 1) * h * (1 - h) ^ (D - 1)."""
    return worth * (1 - discount) / (1 - discount * worth)


def _worth_of(hazard: np.ndarray, discount: float) -> np.ndarray:
    """The inverse of _hazard."""
    return hazard / (1 - discount * (1 - hazard))
