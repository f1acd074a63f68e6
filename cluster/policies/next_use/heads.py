"""Probabilities of all experts of all layers from features: logistic regressions, learned example by example.

One example corrects a fixed share of its error through each group of features. So features need no scale and rates no
schedule. Source: normalised least mean squares (Widrow and Hoff 1960; normalised: Nagumo and Noda 1967).

Knows arrays. Knows nothing of sequences or signals.

Shapes: S examples, L MoE layers, E experts of a layer, X features common to all layers, G features of one layer,
V votes of a blend. All float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.policies.signals import Grid

_EDGE = 1e-4


@dataclass(frozen=True, slots=True, kw_only=True)
class LearningRates:
    """Share of its error that one example corrects, 0 to 1: through the bias, the common and the layers' features."""

    bias: float = 0.01
    common: float = 0.15
    own: float = 0.15


class LinearHead:
    """One output for each expert of the grid: log odds, linear in the features. Each has weights of its own.

    Weights: bias [L, E], of_common [X, L * E], of_own [L, G, E].
    """

    def __init__(self, grid: Grid, num_common: int, num_own: int, rates: LearningRates) -> None:
        """Args: num_common: X. num_own: G."""
        self.rates = rates
        self._shape = (grid.num_layers, grid.num_experts)
        self._bias = np.full(self._shape, log_odds(grid.top_k / grid.num_experts), np.float32)
        self._of_common = np.zeros((num_common, grid.size), np.float32)
        self._of_own = np.zeros((grid.num_layers, num_own, grid.num_experts), np.float32)

    @property
    def num_weights(self) -> int:
        """Weights that one step of learning goes through, the few of the bias left out."""
        return self._of_common.size + self._of_own.size

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The weights by name; live."""
        return {"bias": self._bias, "of_common": self._of_common, "of_own": self._of_own}

    def logits(self, common_SX: np.ndarray, own_SLG: np.ndarray) -> np.ndarray:
        """Log odds [S, L, E] from all features."""
        logits_SLE = self.common_logits(common_SX)
        logits_SLE += (own_SLG.swapaxes(0, 1) @ self._of_own).swapaxes(0, 1)
        return logits_SLE

    def common_logits(self, common_SX: np.ndarray) -> np.ndarray:
        """Log odds [S, L, E] from bias and common features alone."""
        logits_SLE = (common_SX @ self._of_common).reshape(-1, *self._shape)
        logits_SLE += self._bias
        return logits_SLE

    def own_logits(self, row: int, own_SG: np.ndarray) -> np.ndarray:
        """Log odds [S, E] that the own features of the layer in row `row` add."""
        return own_SG @ self._of_own[row]

    def learn(self, common_SX: np.ndarray, own_SLG: np.ndarray, errors_SLE: np.ndarray, rows: slice) -> None:
        """Correct the weights by errors: target - prediction.

        Args: rows: the layers that learn.
        """
        rates, errors = self.rates, errors_SLE[:, rows]
        self._bias[rows] += rates.bias * errors.sum(axis=0)
        of_common = self._of_common.reshape(-1, *self._shape)[:, rows].swapaxes(0, 1)
        learn_products(of_common, common_SX[:, None], errors, rates.common)
        learn_products(self._of_own[rows], own_SLG[:, rows], errors, rates.own)


class Blend:
    """Weighs V predictions of the same thing, its votes, given as log odds. The first vote is the constant 1.

    The experts of a layer share the weights [..., V]. With so few it follows within tens of steps what votes have
    become worth. Those that stop coming true lose theirs, and the blend stays calibrated.
    """

    def __init__(self, shape: tuple[int, ...], weights: Sequence[float], *, rate: float) -> None:
        """Args: shape: of independent blends, [L, ...]. weights: V of them, to begin with. rate: share of an error."""
        self._weights = np.tile(np.array(weights, np.float32), (*shape, 1))
        self.rate = rate

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The weights by name; live."""
        return {"weights": self._weights}

    def logits(self, votes: np.ndarray, rows: int | slice = slice(None)) -> np.ndarray:
        """Log odds [S, ..., E] from votes [S, ..., V, E]. The axes between are those of `shape`, of these rows."""
        return (self._weights[rows][..., None, :] @ votes)[..., 0, :]

    def learn(self, votes: np.ndarray, errors: np.ndarray, rows: slice = slice(None)) -> None:
        """Correct the weights of these rows by errors [S, ..., E], target - prediction, of votes [S, ..., V, E]."""
        scaled = self.rate * errors / np.square(votes).sum(axis=-2)
        self._weights[rows] += (votes @ scaled[..., None])[..., 0].sum(axis=0)


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
    """One step of normalised least mean squares, of B regressions with F features and N outputs each.

    weights [B, F, N] += rate * sum over S of features [S, B, F] / (1 + their squared norm) times errors [S, B, N].
    """
    scaled = rate * features / (1 + np.square(features).sum(axis=-1, keepdims=True))
    for features_BF, errors_BN in zip(scaled, errors, strict=True):  # a product of matrices is slow with one example
        weights += features_BF[..., None] * errors_BN[:, None]
