"""What NextUse has compiled code do, if there is any. It computes what numpy does here, several times sooner.

The dataclasses have the fields of the structures in actors/kernels/search.h, in their order. Arrays are float32 and
contiguous unless a field says otherwise.

Shapes: S sequences of a step, L MoE layers, E experts of a layer, A moving averages, C = 2 + A kinds of share,
G = (1 + A) E gate features, X embedding features, R reach, V = 3 votes (W = 5 of the trajectory), N examples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from cluster.policies.signals import GateSignal


@dataclass(frozen=True, slots=True, kw_only=True)
class StepArrays:
    """A step under way, and the models that it is followed with. Compiled code writes into them in place.

    What each holds is said where it is made: StepUnderWay, Expected, LinearHead, Blend, Trajectory. used_SLE is bool.
    nearness_LL: of the layer in the second axis, seen from the first. values_LE: worth times nearness.
    """

    num_rows_S: np.ndarray
    shares_SA: np.ndarray
    kept_SLAE: np.ndarray
    gates_SLCE: np.ndarray
    logs_SLCE: np.ndarray
    used_SLE: np.ndarray
    past_SLE: np.ndarray
    worth_votes_SLVE: np.ndarray
    ahead_votes_SLRWE: np.ndarray
    worth_LE: np.ndarray
    hazards_LE: np.ndarray
    nearness_LL: np.ndarray
    values_LE: np.ndarray
    of_own_LGE: np.ndarray
    worth_blend_LV: np.ndarray
    matrices_LFRE: np.ndarray
    ahead_blend_LRW: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class LessonRates:
    """Share of an error that one example corrects, 0 to 1: of the two heads, their blends, the trajectory and its."""

    bias_rate: float
    common_rate: float
    own_rate: float
    blend_rate: float
    ahead_rate: float
    ahead_blend_rate: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LessonArrays:
    """What is learned of a step that is over, beside what StepArrays has.

    examples_N: int64, the sequences of the step that teach. before, after: the step, see Context. The last six are
    weights, written in place.
    """

    examples_N: np.ndarray
    embedded_before_SX: np.ndarray
    embedded_after_SX: np.ndarray
    gates_before_SLG: np.ndarray
    soon_votes_SLVE: np.ndarray
    past_votes_SLVE: np.ndarray
    soon_SLE: np.ndarray
    soon_bias_LE: np.ndarray
    soon_of_common_XLE: np.ndarray
    soon_of_own_LGE: np.ndarray
    worth_bias_LE: np.ndarray
    worth_of_common_XLE: np.ndarray
    soon_blend_LV: np.ndarray


class StepAddresses(Protocol):
    """A step as compiled code sees it: addresses of its StepArrays, and room to compute."""

    structure: Any
    scratch: np.ndarray


class NextUseKernels(Protocol):
    """Compiled code; of any thread, without state."""

    def pack_step(self, discount: float, arrays: StepArrays) -> StepAddresses:
        """A step for the other two."""
        ...

    def follow(self, step: StepAddresses, gates: Sequence[GateSignal]) -> None:
        """Take in what gates said, in the order of their layers."""
        ...

    def learn(self, step: StepAddresses, rates: LessonRates, arrays: LessonArrays, *, first: int, turns: int) -> None:
        """Learn from a step that is over. Layers first, first + turns, ... learn."""
        ...
