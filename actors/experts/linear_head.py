"""Probabilities of all experts of all layers from features: logistic regression, learned example by example.

Knows arrays; knows nothing of sequences or signals. One example corrects a fixed share of its error through each group
of features (normalised least mean squares), so features need no scale and rates no schedule.

Shapes: S examples, L MoE layers, E experts of a layer, X features common to all layers, G features of a layer.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from actors.experts.signals import Grid


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRates:
    """Share of an error that one example corrects, through the bias, the common and the layers' features."""

    bias: float = 0.01
    common: float = 0.15
    own: float = 0.15


class LinearHead:
    """One output per expert of the grid."""

    def __init__(self, grid: Grid, num_common: int, num_own: int, rates: LearningRates) -> None:
        self._rates = rates
        prior = grid.top_k / grid.num_experts
        self._shape = (grid.num_layers, grid.num_experts)
        self._bias = np.full(self._shape, np.log(prior / (1 - prior)) if prior < 1 else 0.0, np.float32)
        self._of_common = np.zeros((num_common, grid.size), np.float32)
        self._change = np.empty_like(self._of_common)  # kept: fresh memory costs more than the product
        self._of_own = np.zeros((grid.num_layers, num_own, grid.num_experts), np.float32)

    def predict(self, common: np.ndarray, own: np.ndarray) -> np.ndarray:
        """[S, L, E] from common [S, X] and own [S, L, G]."""
        logits = (common @ self._of_common).reshape(-1, *self._shape)
        logits += self._bias
        logits += (own.swapaxes(0, 1) @ self._of_own).swapaxes(0, 1)
        return sigmoid(logits)

    def predict_row(self, row: int, common: np.ndarray, own: np.ndarray) -> np.ndarray:
        """[S, E] of one layer, from common [S, X] and its own [S, G]."""
        columns = slice(row * self._shape[1], (row + 1) * self._shape[1])
        return sigmoid(self._bias[row] + common @ self._of_common[:, columns] + own @ self._of_own[row])

    def learn(self, common: np.ndarray, own: np.ndarray, errors: np.ndarray) -> None:
        """Correct what was predicted of common [S, X] and own [S, L, G] by target - prediction [S, L, E]."""
        rates = self._rates
        self._bias += rates.bias * errors.sum(axis=0)
        np.matmul((rates.common * _per_energy(common)).T, errors.reshape(len(errors), -1), out=self._change)
        self._of_common += self._change
        self._of_own += (rates.own * _per_energy(own)).transpose(1, 2, 0) @ errors.swapaxes(0, 1)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Elementwise logistic function; does not overflow."""
    return 0.5 + 0.5 * np.tanh(0.5 * logits)


def _per_energy(features: np.ndarray) -> np.ndarray:
    return features / (1.0 + np.square(features).sum(axis=-1, keepdims=True))
