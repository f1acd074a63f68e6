"""The machine that a replay simulates: memory, link, and what computing takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TypeVar, cast

import numpy as np

_MAX_LOST = 0.9
_Seconds = TypeVar("_Seconds", float, np.ndarray)


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computing takes. The defaults are the demo model widened 32 times on one core (measured).

    base_s: attention and gate of a layer, sequence_s more for every sequence but the first. An expert takes `expert_s`,
    or `row_s` a token if that is more. wake_s: what an expert that a step waited for costs beyond its compute: waking
    up, a call of its own. spread: of a layer's compute times, the standard deviation of their logarithm. Where it
    matters is beside prefetch: with layers that take always as long as each other, how many chunks fit beside one is a
    whole number, and 0.1 ms more or less of compute is up to an expert more or less. contention: how much longer
    computing takes while the link is busy, as a share: copies take memory and processor from it. lag_s: how late a
    chunk of a load ahead begins, on average, after the link became free: its thread wakes.

    predict_s: from a gate to its forecast, for policies that predict, what waited before it included; predict_spread:
    of that, the standard deviation of the logarithm. The live memory forecasts on a thread of its own, so compute does
    not wait for it unless `predict_on_path`; the forecast only counts from then on, be it during the next layers.
    search_s: how much longer computing takes if a forecast is made beside it from beginning to end; beside waiting it
    costs nothing.
    """

    base_s: float = 1e-4
    sequence_s: float = 0.0
    expert_s: float = 1e-4
    row_s: float = 1e-5
    wake_s: float = 0.0
    spread: float = 0.0
    contention: float = 0.0
    lag_s: float = 0.0
    predict_s: float = 0.0
    predict_spread: float = 0.0
    predict_on_path: bool = False
    search_s: float = 0.0

    def gate_s(self, num_sequences: int) -> float:
        """Attention and gate of a layer."""
        return self.base_s + (num_sequences - 1) * self.sequence_s

    def compute_s(self, rows: Sequence[int]) -> list[float]:
        """Of experts with so many tokens each."""
        return [max(self.expert_s, n * self.row_s) for n in rows]

    def beside_link_s(self, began_s: _Seconds, alone_s: _Seconds, until_s: _Seconds) -> _Seconds:
        """When a computation ends that takes `alone_s` beside an idle link; this one is busy until then."""
        return _slowed_s(began_s, alone_s, until_s, lost=1 - 1 / (1 + self.contention))

    def beside_search_s(self, began_s: float, alone_s: float, until_s: float) -> float:
        """When a computation ends that takes `alone_s` by itself; until then a forecast is being made."""
        lost = min(self.search_s / self.predict_s, _MAX_LOST) if self.predict_s else 0.0
        return _slowed_s(began_s, alone_s, until_s, lost=lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """num_slots: experts that fit."""

    num_slots: int
    expert_bytes: int
    link_bytes_per_s: float
    processor: Processor = field(default_factory=Processor)

    @property
    def load_s(self) -> float:
        """One expert over the link."""
        return self.expert_bytes / self.link_bytes_per_s


def _slowed_s(began_s: _Seconds, alone_s: _Seconds, until_s: _Seconds, lost: float) -> _Seconds:
    """When a computation ends that loses a share of its speed until then."""
    if not lost:
        return began_s + alone_s
    beside_s = np.minimum(alone_s / (1 - lost), np.maximum(until_s - began_s, 0.0))
    return cast("_Seconds", began_s + alone_s + lost * beside_s)
