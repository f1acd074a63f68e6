"""What the next period's loads will be, from the last one's counts: what was noise is not planned for.

Shapes: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import numpy as np

_ACTIVATIONS_PER_OBSERVATION = 8.0  # neighbouring tokens choose alike: so many tell as much as one (as in semantics)


def forecast(counts_LE: np.ndarray, persistence: float = 1.0) -> np.ndarray:
    """Expected counts, (L, E): each layer's counts drawn to their mean, as far as chance or change explains them.

    Two shares are taken off what lies above or below the mean: what equal experts would show by chance alone (James and
    Stein's shrinkage; some neighbouring activations count as one Poisson event), and what did not last so far.

    Args:
        counts_LE: decayed counts; their sum is what they weigh as a sample.
        persistence: how much of a deviation lasts, 0 to 1 (`persistence`).
    """
    mean_L1 = counts_LE.mean(axis=1, keepdims=True)
    kept_L1 = reliability(counts_LE)[:, None] * min(max(persistence, 0.0), 1.0)
    return mean_L1 + kept_L1 * (counts_LE - mean_L1)


def reliability(counts_LE: np.ndarray) -> np.ndarray:
    """The share of each layer's variance that is not sampling noise, (L,), 0 to 1."""
    mean_L, var_L = counts_LE.mean(axis=1), counts_LE.var(axis=1)
    noise_L = np.divide(_ACTIVATIONS_PER_OBSERVATION * mean_L, var_L, out=np.ones_like(mean_L), where=var_L > 0)
    return np.clip(1.0 - noise_L, 0.0, 1.0)


def persistence(first_LE: np.ndarray, second_LE: np.ndarray) -> float:
    """How much of the deviations of one period the next one repeats: the slope of the regression, 0 to 1.

    1: plan by the past; 0: the past says nothing. What the first period shows by chance is taken off its spread, so
    that few counts alone do not look like change (`forecast` takes them off by themselves).
    """
    first, second = _deviations(first_LE), _deviations(second_LE)
    total_L = first_LE.sum(axis=1)
    chance_L = np.divide(
        _ACTIVATIONS_PER_OBSERVATION * (1.0 - 1.0 / first_LE.shape[1]),
        total_L,
        out=np.zeros_like(total_L, dtype=np.float64),
        where=total_L > 0,
    )
    spread = float((first * first).sum() - chance_L.sum())
    return min(max(float((first * second).sum()) / spread, 0.0), 1.0) if spread > 0 else 0.0


def _deviations(counts_LE: np.ndarray) -> np.ndarray:
    """Shares of a layer's activations, less the even share."""
    total_L1 = counts_LE.sum(axis=1, keepdims=True).astype(np.float64)
    used = total_L1 > 0
    shares = np.divide(counts_LE, total_L1, out=np.zeros(counts_LE.shape), where=used)
    return shares - np.where(used, 1.0 / counts_LE.shape[1], 0.0)
