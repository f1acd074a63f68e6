"""What the gates of a step say of the layers that follow in it, learned online.

The trajectory as fMoE means it, but as a linear model in place of a search: the log of a layer's gate probabilities,
and of those that the next layer's gate gives to this layer's input (`ahead`), are features of the log odds of every
expert of the next layers.

Shapes: S sequences, L MoE layers, E experts of a layer, R reach: layers ahead, F = 2 E features of a gate.
"""

from __future__ import annotations

import numpy as np

from cluster.policies.next_use.heads import Blend, learn_products, sigmoid
from cluster.policies.signals import Grid

RATE = 0.5
BLEND_RATE = 0.04


class Trajectory:
    """Refines the log odds of the next R layers after each gate."""

    def __init__(self, grid: Grid, reach: int) -> None:
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
        """What a step of learning has to go through."""
        return self._matrices.size

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What was learned; live."""
        return {"matrices": self._matrices, **self._blend.arrays}

    def parts(self, popular: np.ndarray) -> np.ndarray:
        """[1, L, R, 5, E] from log odds [L, E], with room for what the models say."""
        parts = np.zeros((1, *self._rows.shape, 5, popular.shape[-1]), np.float32)
        parts[..., 0, :] = 1
        parts[..., 2, :] = popular[self._rows]
        return parts

    def with_base(self, parts: np.ndarray, base: np.ndarray) -> np.ndarray:
        """[S, L, R, 5, E] from those and log odds [S, L, E] known before the first gate."""
        parts = parts.repeat(len(base), axis=0)
        for i in range(self.reach):
            parts[:, : -1 - i, i, 1] = base[:, i + 1 :]
        return parts

    def logits(self, row: int, gates: np.ndarray, parts: np.ndarray) -> np.ndarray:
        """[S, R', E] of the R' <= R layers after `row`. Args: gates: [S, 2, E], log of ahead and of probabilities."""
        parts = parts[:, row]
        parts[:, 0, 3] = gates[:, 0]  # the next gate's word speaks for the next layer only
        parts[:, :, 4] = (gates.reshape(len(gates), -1) @ self._matrices[row]).reshape(len(gates), self.reach, -1)
        return self._blend.logits(parts, row)[:, : self._num_layers - 1 - row]

    def learn(self, gates: np.ndarray, parts: np.ndarray, used: np.ndarray, rows: slice) -> None:
        """Of a whole step. Args: gates: [S, L, 2, E]. parts: [S, L, R, 5, E]. used: [S, L, E]. rows: whose gates."""
        gates, parts, matrices = gates[:, rows], parts[:, rows], self._matrices[rows]
        features = gates.reshape(*gates.shape[:2], -1).swapaxes(0, 1)  # [rows, S, F]
        parts[:, :, 0, 3] = gates[:, :, 0]
        parts[..., 4, :] = (features @ matrices).reshape(*features.shape[:2], self.reach, -1).swapaxes(0, 1)
        errors = used[:, self._rows[rows]] - sigmoid(self._blend.logits(parts, rows))
        errors *= self._in_step[rows]
        self._blend.learn(parts, errors, rows)
        by_layer = errors.reshape(*errors.shape[:2], -1)
        learn_products(matrices, features.swapaxes(0, 1), by_layer, RATE)
