"""The models of the next use: what they expect of a step, and what they learn from it. See estimate.py.

Shapes: S sequences of a step, N of them that teach, L MoE layers, E experts of a layer, G gate features of a layer,
X embedding features, V votes of a blend. All float32 unless said.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from cluster.policies.next_use.hazards import hazard_from, merge_sequences, worth_from
from cluster.policies.next_use.heads import Blend, LinearHead, log_odds, sigmoid
from cluster.policies.next_use.settings import NextUseSettings
from cluster.policies.next_use.step import Expected, StepUnderWay, votes_of, with_model
from cluster.policies.next_use.trajectory import Trajectory
from cluster.policies.policy_state import NUM_LEARNED
from cluster.policies.signals import Grid
from cluster.policies.state_average import average_in

_BLEND_RATE = 0.02
_FIRST_WEIGHTS = (0.0, 1.0, 0.0)  # of a blend: all is the head's
_POPULARITY_RATE = 0.002
_POPULARITY_EVERY = 16  # steps: it changes slowly
_PRIOR_STEPS = 50


class NextUseModels:
    """Heads for q and for y with their blends, the trajectory, and popularity.

    soon, soon_blend: q, the probability that the step which begins uses an expert.
    worth, worth_blend: y, its worth after a step.
    trajectory: q of the next layers, once more after each gate.
    popularity: [L, E], share of the steps that used an expert.
    """

    def __init__(self, grid: Grid, embedding_dim: int, settings: NextUseSettings) -> None:
        self.discount = settings.discount
        num_common = 2 * settings.dim(embedding_dim)
        num_own = (1 + len(settings.gate_averages)) * grid.num_experts
        self.soon, self.worth = (LinearHead(grid, num_common, num_own, settings.rates) for _ in range(2))
        self.soon_blend, self.worth_blend = (
            Blend((grid.num_layers,), _FIRST_WEIGHTS, rate=_BLEND_RATE) for _ in range(2)
        )
        self.trajectory = Trajectory(grid, settings.reach)
        self.popularity = np.full((grid.num_layers, grid.num_experts), grid.top_k / grid.num_experts, np.float32)
        self._num_learned = self._num_steps = 0
        num_weights = self.soon.num_weights + self.worth.num_weights + self.trajectory.num_weights
        self._num_turns = min(-(-num_weights // settings.weights_per_step), grid.num_layers)
        self._notice_popularity()

    @property
    def turn(self) -> slice:
        """The layers that learn from the present step."""
        return slice(self._num_steps % self._num_turns, None, self._num_turns)

    def expect(self, step: StepUnderWay) -> Expected:
        """What is expected as a step begins, before its first gate."""
        popular, long_popular, ahead = self._popular
        base = self.soon.logits(step.after.embedded, step.before.gates)
        soon_votes, past_votes = with_model(popular, base), with_model(long_popular, step.before.worth)
        soon, past = sigmoid(self.soon_blend.logits(soon_votes)), sigmoid(self.worth_blend.logits(past_votes))
        unused = (1 - soon) ** step.num_rows
        return Expected(
            soon_votes_SLVE=soon_votes,
            past_votes_SLVE=past_votes,
            worth_votes_SLVE=with_model(long_popular, self.worth.common_logits(step.after.embedded)),
            ahead_votes_SLRWE=self.trajectory.with_base(ahead, base),
            soon_SLE=soon,
            past_SLE=past,
            hazards_LE=1 - unused.prod(axis=0),
            worth_LE=merge_sequences(1 - unused * (1 - self.discount * past), self.discount),
        )

    def pass_layer(self, step: StepUnderWay, expected: Expected, row: int) -> None:
        """The gate of a row has spoken: the next use of the layer's experts is now in the next step."""
        step.add_features(row + 1)
        votes = expected.worth_votes_SLVE[:, row]
        votes[:, 1] += self.worth.own_logits(row, step.logs[:, row, 1:].reshape(len(votes), -1))
        merged = merge_sequences(sigmoid(self.worth_blend.logits(votes, row)), self.discount)
        expected.worth_LE[row], expected.hazards_LE[row] = merged, hazard_from(merged, self.discount)

    def look_ahead(self, step: StepUnderWay, expected: Expected, row: int) -> None:
        """What the gate of a row says of the next layers of the step."""
        logits = self.trajectory.logits(row, step.logs[:, row, :2], expected.ahead_votes_SLRWE)
        rows = slice(row + 1, row + 1 + logits.shape[1])
        unused = sigmoid(-logits) ** step.num_rows
        worth = 1 - unused * (1 - self.discount * expected.past_SLE[:, rows])
        expected.worth_LE[rows] = merge_sequences(worth, self.discount)
        expected.hazards_LE[rows] = 1 - unused.prod(axis=0)

    def learn(self, step: StepUnderWay, expected: Expected, examples_N: np.ndarray) -> None:
        """Learn from a step that is over. Args: examples_N: int64, the sequences of the step that teach."""
        layers, before, after = self.turn, step.before, step.after
        own, used = before.gates[examples_N], step.used[examples_N]
        soon_votes, past_votes, worth_votes = (
            votes[examples_N]
            for votes in (expected.soon_votes_SLVE, expected.past_votes_SLVE, expected.worth_votes_SLVE)
        )
        following = sigmoid(self.worth_blend.logits(worth_votes))
        target = np.where(used, np.float32(1), np.float32(self.discount) * following)
        self.worth.learn(before.embedded[examples_N], own, target - sigmoid(past_votes[:, :, 1]), layers)
        self.worth_blend.learn(past_votes, target - expected.past_SLE[examples_N])
        self.soon.learn(after.embedded[examples_N], own, used - sigmoid(soon_votes[:, :, 1]), layers)
        self.soon_blend.learn(soon_votes, used - expected.soon_SLE[examples_N])
        self.trajectory.learn(step.logs[examples_N, :, :2], expected.ahead_votes_SLRWE[examples_N], used, layers)

    def count_step(self, used_NLE: np.ndarray) -> None:
        """A step was learned from: popularity follows, and the next layers have their turn. Args: used_NLE: bool."""
        self._num_learned += len(used_NLE)
        rate = max(_POPULARITY_RATE, 1 / (self._num_learned + _PRIOR_STEPS))
        self.popularity += rate * (used_NLE - self.popularity).sum(axis=0)
        self._num_steps += 1
        if self._num_steps % _POPULARITY_EVERY == 0:
            self._notice_popularity()

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
        models = {
            "soon": self.soon,
            "soon_blend": self.soon_blend,
            "worth": self.worth,
            "worth_blend": self.worth_blend,
            "trajectory": self.trajectory,
        }
        fields = {f"{name}.{field}": a for name, model in models.items() for field, a in model.arrays.items()}
        return {"popularity": self.popularity, **fields}

    def _notice_popularity(self) -> None:
        popular = log_odds(self.popularity)
        long_popular = log_odds(worth_from(self.popularity, self.discount))
        self._popular = votes_of(popular), votes_of(long_popular), self.trajectory.votes(popular)
