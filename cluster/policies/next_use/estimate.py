"""When each expert is used next: one estimate from all signals, learned online, for eviction and prefetch.

For every expert and every sequence:
  q = P(used in the step that begins). The step's token is known, so its embedding speaks for every layer.
  y = E[discount ^ (D - 1)], D = steps from the present one to the next use.

Three models. `soon` gives q as a step begins. `trajectory` gives q of the next layers again after each gate. `worth`
gives y. The label of y comes steps later, so it is learned by temporal differences (Sutton 1988): the target is
u + (1 - u) * discount * y'. There u says whether the next step used the expert, and y' is the estimate made there.

Features of a sequence: the embedding of its token and the average of embeddings (what the text means), and for each
layer the logs of the gate's probabilities and of their fast and slow averages (recency and gate mass). The models are
blended with popularity by how well both did of late. Where nothing can be known, popularity remains.
Sequences are taken as independent: hazards merge as 1 - prod(1 - h).

Knows signals. Knows no memory and no link. Gates are only stored until somebody asks. Learning is one batch over all
layers, at the end of a step in which somebody asked; where everything is resident it costs nothing.

Shapes: S sequences of a step, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cluster.policies.next_use.compiled import lesson_arrays, lesson_rates, step_arrays
from cluster.policies.next_use.kernels import NextUseKernels
from cluster.policies.next_use.models import NextUseModels
from cluster.policies.next_use.sequences import SequenceContexts
from cluster.policies.next_use.settings import NextUseSettings
from cluster.policies.next_use.step import Expected, StepUnderWay
from cluster.policies.signals import GateSignal, Grid, Silent, StepSignal


class NextUse(Silent):
    """Follows all sequences and values every expert.

    A sequence's gates teach that some experts follow others.

    >>> next_use = NextUse(Grid(layers=(0,), num_experts=2, top_k=1), embedding_dim=4)
    >>> for step in range(100):  # experts take turns
    ...     next_use.on_step(StepSignal((7,), np.zeros((1, 4), np.float32), np.ones(1), np.ones(1, bool)))
    ...     gate = np.eye(2, dtype=np.float32)[[step % 2]]
    ...     next_use.on_gate(GateSignal(row=0, probs=gate, counts=gate, ahead=None))
    ...     values = next_use.values().copy()
    ...     next_use.on_step_end()
    >>> bool(values[0] > values[1])  # 1 was used last, so 0 comes sooner
    True
    """

    def __init__(
        self,
        grid: Grid,
        *,
        embedding_dim: int,
        settings: NextUseSettings | None = None,
        kernels: NextUseKernels | None = None,
    ) -> None:
        """Args: settings: None: the defaults. kernels: None: all of it in numpy, several times slower."""
        settings = settings or NextUseSettings()
        self._grid, self._kernels = grid, kernels
        self._models = NextUseModels(grid, embedding_dim, settings)
        self._sequences = SequenceContexts(grid, embedding_dim, settings, self._models.worth.arrays["bias"])
        self._valued: set[int] = set()  # sequences of which somebody asked in their last step
        self._step: StepUnderWay | None = None
        layer = np.arange(grid.num_layers)
        layers_ahead = (layer[None] - layer[:, None] - 1) % grid.num_layers + 1
        self._nearness_LL = (settings.discount ** (layers_ahead / grid.num_layers)).astype(np.float32)
        self._values_LE = np.zeros((grid.num_layers, grid.num_experts), np.float32)

    @property
    def num_sequences(self) -> int:
        """Sequences of which something is kept."""
        return len(self._sequences)

    def on_step(self, step: StepSignal) -> None:
        self._step = self._sequences.begin_step(step)

    def on_gate(self, gate: GateSignal) -> None:
        self._present.add_gate(gate)

    def on_step_end(self) -> None:
        step = self._present
        if step.expected is not None:
            self._catch_up(step, step.expected)
        step.add_features(self._grid.num_layers)
        if step.expected is not None:
            self._learn(step, step.expected)
            self._valued.update(step.signal.sequences)
        else:
            self._valued.difference_update(step.signal.sequences)
        self._sequences.end_step(step)
        self._step = None

    def on_step_broken(self) -> None:
        self._step = None  # nothing is learned, and no context changed, before the end

    def on_sequence_end(self, sequence: int) -> None:
        self._sequences.forget(sequence)
        self._valued.discard(sequence)

    def learn_from_step(self) -> None:
        """Make the step under way one to learn from, as asking for values does."""
        self._expect(self._present)

    def soon(self) -> np.ndarray:
        """[S, L, E] probability that a token of a sequence uses an expert in this step, as known at its begin."""
        return self._expect(self._present).soon_SLE

    def hazards(self) -> np.ndarray:
        """[L, E] probability that an expert is used at the next pass of its layer, sequences merged; a live view.

        Of layers to come that is in this step, of those passed in the next one.
        """
        step = self._present
        return self._catch_up(step, self._expect(step)).hazards_LE

    def values(self) -> np.ndarray:
        """[L * E] expected discount ^ steps to the next use, seen from the present layer; a live view.

        Between steps it is what it was at the end of the last one.
        """
        if self._step is not None:
            self._catch_up(self._step, self._expect(self._step))
        return self._values_LE.reshape(-1)

    def to_arrays(self) -> dict[str, np.ndarray]:
        """A copy of all that was learned, and from how many steps of sequences."""
        return self._models.to_arrays()

    def load_arrays(self, arrays: Mapping[str, np.ndarray]) -> None:
        """Average in what another one learned, by the steps that both learned from.

        Raises:
            ConfigError: fields are missing or of other shapes.
        """
        self._models.load_arrays(arrays)

    @property
    def _present(self) -> StepUnderWay:
        assert self._step is not None, "between on_step and on_step_end"
        return self._step

    def _expect(self, step: StepUnderWay) -> Expected:
        if step.expected is None:
            step.expected = self._models.expect(step)
            self._value_experts(step.expected, step.expected.row)
        return step.expected

    def _catch_up(self, step: StepUnderWay, expected: Expected) -> Expected:
        """Take in the gates heard since the last time."""
        if expected.row == step.row:
            return expected
        if self._kernels is not None:
            self._catch_up_compiled(step, expected, self._kernels)
        else:
            for row in range(expected.row + 1, step.row + 1):
                self._models.pass_layer(step, expected, row)
            if step.row + 1 < self._grid.num_layers:
                self._models.look_ahead(step, expected, step.row)
            self._value_experts(expected, step.row)
        expected.row = step.row
        return expected

    def _catch_up_compiled(self, step: StepUnderWay, expected: Expected, kernels: NextUseKernels) -> None:
        if expected.packed is None:
            arrays = step_arrays(step, expected, self._models, self._nearness_LL, self._values_LE)
            expected.packed = kernels.pack_step(self._models.discount, arrays)
        kernels.follow(expected.packed, step.heard)
        step.heard.clear()
        step.featured = step.row

    def _value_experts(self, expected: Expected, row: int) -> None:
        np.multiply(expected.worth_LE, self._nearness_LL[row][:, None], out=self._values_LE)

    def _learn(self, step: StepUnderWay, expected: Expected) -> None:
        """Steps of one token teach; the mean over a prompt's tokens would not."""
        signal, models = step.signal, self._models
        known = [sequence in self._valued for sequence in signal.sequences]
        examples = np.flatnonzero(signal.is_decode & np.array(known))
        if not len(examples):
            return
        if self._kernels is not None and expected.packed is not None:
            arrays, layers = lesson_arrays(step, expected, models, examples), models.turn
            self._kernels.learn(expected.packed, lesson_rates(models), arrays, first=layers.start, turns=layers.step)
        else:
            models.learn(step, expected, examples)
        models.count_step(step.used[examples])
