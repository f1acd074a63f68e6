"""Hazard and worth of an expert, one from the other.

hazard h: probability that the expert is used at the next pass of its layer, 0 to 1.
worth w: E[discount ^ (D - 1)], 0 to 1, where D = 1, 2, ... counts the passes until its next use.
If h stays the same at each pass, w = sum over D of discount ^ (D - 1) * h * (1 - h) ^ (D - 1), a geometric series.

>>> worth = worth_from(np.array([0.5, 1.0]), discount=0.5)  # used every second time, and every time
>>> [round(float(w), 3) for w in worth]
[0.667, 1.0]
>>> [round(float(h), 3) for h in hazard_from(worth, discount=0.5)]
[0.5, 1.0]

Two sequences that use an expert half of the time, each for itself, use it three quarters of the time.

>>> merged = merge_sequences(np.array([[2 / 3], [2 / 3]]), discount=0.5)
>>> round(float(hazard_from(merged, discount=0.5)[0]), 3)
0.75
"""

from __future__ import annotations

import numpy as np


def hazard_from(worth: np.ndarray, discount: float) -> np.ndarray:
    """Hazards of any shape, from worths of that shape."""
    return worth * (1 - discount) / (1 - discount * worth)


def worth_from(hazard: np.ndarray, discount: float) -> np.ndarray:
    """The inverse of hazard_from."""
    return hazard / (1 - discount * (1 - hazard))


def merge_sequences(worth: np.ndarray, discount: float) -> np.ndarray:
    """Worth [...] for all sequences together, from worth [S, ...] for each of S.

    Sequences are taken as independent: an expert is unused only if all leave it unused.
    """
    if len(worth) == 1:
        return worth[0]
    return worth_from(1 - (1 - hazard_from(worth, discount)).prod(axis=0), discount)
