"""What NextUse has compiled code do, if there is any: it computes the same as numpy, several times sooner.

Shapes: S sequences of a step, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np

from cluster.policies.signals import GateSignal


class StepArrays(Protocol):
    """A step under way as compiled code sees it; what it points into is written to in place."""

    structure: Any
    scratch: np.ndarray


class NextUseKernels(Protocol):
    """Compiled code; of any thread, without state."""

    def pack_step(self, sizes: Mapping[str, int], discount: float, arrays: Mapping[str, np.ndarray]) -> StepArrays:
        """A step for the other two. Args: arrays: float32 (used: bool), contiguous."""
        ...

    def follow(self, step: StepArrays, gates: Sequence[GateSignal]) -> None:
        """Take in what gates said, in the order of their layers."""
        ...

    def learn(
        self,
        step: StepArrays,
        rates: Mapping[str, float],
        arrays: Mapping[str, np.ndarray],
        *,
        first: int,
        turns: int,
    ) -> None:
        """Learn from a step that is over; of layers `first`, `first` + `turns`, ...

        Args: arrays: examples int64, the others float32; all contiguous.
        """
        ...
