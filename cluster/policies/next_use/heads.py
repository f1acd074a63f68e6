"""Probabilities of all experts of all layers from features: logistic regressions, learned example by example.

Knows arrays; knows nothing of sequences or signals. One example corrects a fixed share of its error through each group
of features (normalised least mean squares), so features need no scale and rates no schedule.

Shapes: S examples, L MoE layers, E experts of a layer, X features common to all layers, G features of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.policies.signals import Grid

_EDGE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRates:
    """Share of an error that one example corrects, through the bias, the common and the layers' features."""

    bias: float = 0.01
    common: float = 0.15
    own: float = 0.15


class LinearHead:
    """One output per expert of the grid, each with weights of its own."""

    def __init__(self, grid: Grid, num_common: int, num_own: int, rates: LearningRates) -> None:
        self.rates = rates
        self._shape = (grid.num_layers, grid.num_experts)
        self._bias = np.full(self._shape, log_odds(grid.top_k / grid.num_experts), np.float32)
        self._of_common = np.zeros((num_common, grid.size), np.float32)
        self._of_own = np.zeros((grid.num_layers, num_own, grid.num_experts), np.float32)

    @property
    def num_weights(self) -> int:
        """What a step of learning has to go through."""
        return self._of_common.size + self._of_own.size

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What was learned; live."""
        return {"bias": self._bias, "of_common": self._of_common, "of_own": self._of_own}

    def logits(self, common: np.ndarray, own: np.ndarray) -> np.ndarray:
        """[S, L, E] from common [S, X] and own [S, L, G]."""
        logits = self.common_logits(common)
        logits += (own.swapaxes(0, 1) @ self._of_own).swapaxes(0, 1)
        return logits

    def common_logits(self, common: np.ndarray) -> np.ndarray:
        """[S, L, E] without what the layers' own features say."""
        logits = (common @ self._of_common).reshape(-1, *self._shape)
        logits += self._bias
        return logits

    def own_logits(self, row: int, own: np.ndarray) -> np.ndarray:
        """[S, E] that a layer's own features [S, G] add."""
        return own @ self._of_own[row]

    def learn(self, common: np.ndarray, own: np.ndarray, errors: np.ndarray, rows: slice) -> None:
        """Correct what was predicted of common [S, X] and own [S, L, G] by target - prediction [S, L, E].

        Args: rows: the layers that learn.
        """
        rates, errors = self.rates, errors[:, rows]
        self._bias[rows] += rates.bias * errors.sum(axis=0)
        of_common = self._of_common.reshape(-1, *self._shape)[:, rows].swapaxes(0, 1)
        learn_products(of_common, common[:, None], errors, rates.common)
        learn_products(self._of_own[rows], own[:, rows], errors, rates.own)


class Blend:
    """Weighs a few predictions of the same thing, given as log odds: weights are shared by the experts of a layer.

    With so few weights it follows within tens of steps what the predictions have become worth: those that stop coming
    true lose theirs, and the blend stays calibrated. The first of F parts is the constant 1.
    """

    def __init__(self, shape: tuple[int, ...], weights: Sequence[float], *, rate: float) -> None:
        """Args: shape: of independent blends, [L, ...]. weights: [F], to begin with."""
        self._weights = np.tile(np.array(weights, np.float32), (*shape, 1))
        self.rate = rate

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """What was learned; live."""
        return {"weights": self._weights}

    def logits(self, parts: np.ndarray, rows: int | slice = slice(None)) -> np.ndarray:
        """[S, ..., E] from parts [S, ..., F, E]; the axes between are those of `shape`, or of one of its rows."""
        return (self._weights[rows][..., None, :] @ parts)[..., 0, :]

    def learn(self, parts: np.ndarray, errors: np.ndarray, rows: slice = slice(None)) -> None:
        """Correct what was predicted of the parts, of these rows, by target - prediction [S, ..., E]."""
        scaled = self.rate * errors / np.square(parts).sum(axis=-2)
        self._weights[rows] += (parts @ scaled[..., None])[..., 0].sum(axis=0)


def sigmoid(logits: np.ndarray) -> np.ndarray:
    """Elementwise logistic function; does not overflow."""
    result = 0.5 * logits
    np.tanh(result, out=result)
    result *= 0.5
    result += 0.5
    return result


def log_odds(probability: np.ndarray | float) -> np.ndarray:
    """The inverse of sigmoid, finite also of 0 and 1."""
    clipped = np.clip(probability, _EDGE, 1 - _EDGE)
    return np.log(clipped / (1 - clipped))


def learn_products(weights: np.ndarray, features: np.ndarray, errors: np.ndarray, rate: float) -> None:
    """A step of normalised least mean squares, of B regressions with F features and N outputs each.

    weights [B, F, N] += rate * sum over S of features [S, B, F] / (1 + their squared norm) times errors [S, B, N].
    """
    scaled = rate * features / (1 + np.square(features).sum(axis=-1, keepdims=True))
    for features_BF, errors_BN in zip(scaled, errors, strict=True):  # a product of matrices is slow with one example
        weights += features_BF[..., None] * errors_BN[:, None]
