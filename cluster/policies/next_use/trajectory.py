"""What the gates of a step say of the layers that follow in it, learned online.

For each layer a linear model with F = 2 E features: the log of its gate's probabilities, and the log of those that the
next layer's gate gives to the same input (`ahead`). Its outputs are log odds of every expert of the next R layers.
Source: the trajectory of fMoE (2025), with a linear model in the place of its search.

Shapes: S sequences, L MoE layers, E experts of a layer, R reach: layers ahead, F features of a gate. A blend has V = 5
votes: the constant 1, the head before the first gate, popularity, the next gate itself, this model. All float32.
"""

from __future__ import annotations

import numpy as np

from cluster.policies.next_use.heads import Blend, learn_products, sigmoid
from cluster.policies.signals import Grid

RATE = 0.5
BLEND_RATE = 0.04
_NUM_VOTES = 5


class Trajectory:
    """Refines the log odds of the next R layers after each gate.

    Weights: matrices [L, F, R * E], and those of the blends [L, R, V].
    """

    def __init__(self, grid: Grid, reach: int) -> None:
        """Args: reach: layers ahead; fewer in a model with fewer layers."""
        self.reach = min(reach, grid.num_layers - 1)
        shape = (grid.num_layers, self.reach)
        num_features, self._num_layers = 2 * grid.num_experts, grid.num_layers
        self._matrices = np.zeros((grid.num_layers, num_features, self.reach * grid.num_experts), np.float32)
        self._blend = Blend(shape, (0.0, 1.0, 0.0, 0.0, 1.0), rate=BLEND_RATE)
        rows = np.arange(grid.num_layers)[:, None] + np.arange(1, self.reach + 1)
        self._in_step = (rows < grid.num_layers).astype(np.float32)[..., None]
        self._rows = np.minimum(rows, grid.num_layers - 1)  # [L, R]

    @property
    def num_weights(self) -> int:
        """Weights that one step of learning goes through, the few of the blends left out."""
        return self._matrices.size

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The weights by name; live."""
        return {"matrices": self._matrices, **self._blend.arrays}

    def votes(self, popular_LE: np.ndarray) -> np.ndarray:
        """Votes [1, L, R, V, E] with popularity, given as log odds, and zeros for what models say."""
        votes = np.zeros((1, *self._rows.shape, _NUM_VOTES, popular_LE.shape[-1]), np.float32)
        votes[..., 0, :] = 1
        votes[..., 2, :] = popular_LE[self._rows]
        return votes

    def with_base(self, votes: np.ndarray, base_SLE: np.ndarray) -> np.ndarray:
        """Votes [S, L, R, V, E]: those, with the log odds known before the first gate."""
        votes = votes.repeat(len(base_SLE), axis=0)
        for i in range(self.reach):
            votes[:, : -1 - i, i, 1] = base_SLE[:, i + 1 :]
        return votes

    def logits(self, row: int, gates_S2E: np.ndarray, votes_SLRVE: np.ndarray) -> np.ndarray:
        """Log odds [S, R', E] of the R' <= R layers after the one in row `row`.

        Args:
            gates_S2E: logs of the shares `ahead` and of the layer's own.
            votes_SLRVE: this row's get what its gate says, in place.
        """
        votes = votes_SLRVE[:, row]
        votes[:, 0, 3] = gates_S2E[:, 0]  # the next gate's word speaks for the next layer only
        features_SF = gates_S2E.reshape(len(gates_S2E), -1)
        votes[:, :, 4] = (features_SF @ self._matrices[row]).reshape(len(gates_S2E), self.reach, -1)
        return self._blend.logits(votes, row)[:, : self._num_layers - 1 - row]

    def learn(self, gates_SL2E: np.ndarray, votes_SLRVE: np.ndarray, used_SLE: np.ndarray, rows: slice) -> None:
        """Learn from a whole step which experts it used, a bool each. Args: rows: of the layers whose gates learn."""
        if not self.reach:  # one layer: none follows
            return
        gates, votes, matrices = gates_SL2E[:, rows], votes_SLRVE[:, rows], self._matrices[rows]
        features = gates.reshape(*gates.shape[:2], -1).swapaxes(0, 1)  # [rows, S, F]
        votes[:, :, 0, 3] = gates[:, :, 0]
        votes[..., 4, :] = (features @ matrices).reshape(*features.shape[:2], self.reach, -1).swapaxes(0, 1)
        errors = used_SLE[:, self._rows[rows]] - sigmoid(self._blend.logits(votes, rows))
        errors *= self._in_step[rows]
        self._blend.learn(votes, errors, rows)
        by_layer = errors.reshape(*errors.shape[:2], -1)
        learn_products(matrices, features.swapaxes(0, 1), by_layer, RATE)
