"""The interface of a predictor. Knows signals (as a listener, where it needs them); knows no memory and no link."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np

BEFORE_FIRST = -1


@dataclass(frozen=True, slots=True)
class Forecast:
    """What to fetch ahead, for each expert of the grid.

    priority: [L, E] float32; larger first, ties to the lower index, 0 and below is not fetched. Rows after the present
    one mean this step, the others the next step.
    probability: [L, E] float32, that the expert is used then; for metrics and for who prices prefetch.
    """

    priority: np.ndarray
    probability: np.ndarray


class Predictor(Protocol):
    """Asked when a step begins and after every gate; told of both before, if it is a listener."""

    def predict(self, row: int) -> Forecast | None:
        """The whole forecast after the gate of `row` (BEFORE_FIRST: the step begins); it replaces the one before.

        Fetches not begun, or begun but no longer wanted, are dropped. None: nothing is to be fetched.
        """
        ...
