"""The machine that a replay simulates: memory, link, and what computing takes.

Its knobs are fitted to a real machine, and each says how. `python -m benchmarks offload` measures them, unless a knob
says otherwise (benchmarks/offload/live.py). "Resident" there means that every expert fits.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Annotated, NamedTuple, TypeVar, cast

import numpy as np

_MAX_LOST = 0.9
_Seconds = TypeVar("_Seconds", float, np.ndarray)


class Knob(NamedTuple):
    """A number that is fitted. unit: s, or 1 for a share. meaning: what it is. measured: how it is measured."""

    unit: str
    meaning: str
    measured: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Processor:
    """What computing takes. The defaults are those of the demo model widened 32 times, on one core.

    >>> processor = Processor(base_s=1e-3, sequence_s=2e-4, expert_s=1e-3, row_s=3e-4)
    >>> round(processor.gate_s(num_sequences=3), 6)
    0.0014
    >>> [round(s, 6) for s in processor.compute_s([1, 10])]  # one token takes as long as three
    [0.001, 0.003]
    """

    base_s: Annotated[
        float,
        Knob(
            "s",
            "Attention and gate of a layer, for one sequence.",
            "Resident, one sequence at a time: the median decode step by layers, less its experts at expert_s each.",
        ),
    ] = 1e-4
    sequence_s: Annotated[
        float,
        Knob(
            "s",
            "What each sequence but the first adds to base_s.",
            "Resident, eight copies of one sequence, which use the same experts: by how much a layer takes longer.",
        ),
    ] = 0.0
    expert_s: Annotated[
        float,
        Knob(
            "s",
            "One expert of a layer for a few tokens, which takes as long as for one.",
            "Resident, eight different sequences against eight copies of one: the longer step by the experts more.",
        ),
    ] = 1e-4
    row_s: Annotated[
        float,
        Knob(
            "s",
            "One token of an expert, where all of its tokens take more than expert_s.",
            "Not by the benchmark, whose steps have few tokens. `moesaic replay --row-ms` sets it.",
        ),
    ] = 1e-5
    wake_s: Annotated[
        float,
        Knob(
            "s",
            "What an expert that a step waited for costs beyond its compute: a thread that wakes, a call of its own.",
            "On-demand LRU at the smallest cache: what makes the replay's median TPOT that of the server.",
        ),
    ] = 0.0
    spread: Annotated[
        float,
        Knob(
            "1",
            "Of a layer's compute times, the standard deviation of their logarithm. With layers that always take the "
            "same, the chunks that fit beside one are a whole number, which jumps.",
            "Resident, one sequence at a time: times from gate to gate.",
        ),
    ] = 0.0
    contention: Annotated[
        float,
        Knob(
            "1",
            "How much longer computing takes while the link is busy: copies take memory and processor from it.",
            "Resident, beside another expert memory that loads all the time and beside none, by turns: the layer's "
            "longer time over the time that the link was busy.",
        ),
    ] = 0.0
    lag_s: Annotated[
        float,
        Knob(
            "s",
            "How late a chunk of a prefetch begins after the link became free, on average: its thread wakes.",
            "The run's own count, ExpertStore.load_late_s.",
        ),
    ] = 0.0
    predict_s: Annotated[
        float,
        Knob(
            "s",
            "From a gate to its forecast, what waited before it included, for policies that predict.",
            "In the run that is replayed: by the clock, the mean of a log-normal distribution.",
        ),
    ] = 0.0
    predict_spread: Annotated[
        float,
        Knob(
            "1",
            "Of predict_s, the standard deviation of the logarithm.",
            "In the run that is replayed: of the same times.",
        ),
    ] = 0.0
    predict_on_path: Annotated[
        bool,
        Knob(
            "1",
            "Whether compute waits for forecasts. The live memory makes them on a thread of its own, so it does not; "
            "a forecast counts from when it is there, be it during the next layers.",
            "Not measured: a question that replay answers.",
        ),
    ] = False
    search_s: Annotated[
        float,
        Knob(
            "s",
            "How much longer computing takes if a forecast is made beside it from beginning to end. Beside waiting it "
            "costs nothing.",
            "One expert less than all fits, so that policies search: layers with that search and without, by turns.",
        ),
    ] = 0.0

    def gate_s(self, num_sequences: int) -> float:
        """Attention and gate of a layer, in seconds."""
        return self.base_s + (num_sequences - 1) * self.sequence_s

    def compute_s(self, rows: Sequence[int]) -> list[float]:
        """Compute times in seconds, of experts with so many tokens each."""
        return [max(self.expert_s, n * self.row_s) for n in rows]

    def beside_link_s(self, began_s: _Seconds, alone_s: _Seconds, until_s: _Seconds) -> _Seconds:
        """When a computation ends that takes `alone_s` beside an idle link. This one is busy until `until_s`.

        began_s and until_s are moments; all may be arrays of one shape.
        """
        return _slowed_s(began_s, alone_s, until_s, lost=1 - 1 / (1 + self.contention))

    def beside_search_s(self, began_s: float, alone_s: float, until_s: float) -> float:
        """When a computation ends that takes `alone_s` by itself. A forecast is being made until `until_s`."""
        lost = min(self.search_s / self.predict_s, _MAX_LOST) if self.predict_s else 0.0
        return _slowed_s(began_s, alone_s, until_s, lost=lost)


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """num_slots: experts that fit in the fast tier. expert_bytes: of one. link_bytes_per_s: into the fast tier."""

    num_slots: int
    expert_bytes: int
    link_bytes_per_s: float
    processor: Processor = field(default_factory=Processor)

    @property
    def load_s(self) -> float:
        """Seconds of one expert over the link."""
        return self.expert_bytes / self.link_bytes_per_s


def _slowed_s(began_s: _Seconds, alone_s: _Seconds, until_s: _Seconds, lost: float) -> _Seconds:
    """When a computation ends that loses the share `lost` of its speed until `until_s`."""
    if not lost:
        return began_s + alone_s
    beside_s = np.minimum(alone_s / (1 - lost), np.maximum(until_s - began_s, 0.0))
    return cast("_Seconds", began_s + alone_s + lost * beside_s)
