"""The machine that a replay simulates: memory, link, and what a layer takes to compute."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The defaults are the demo model widened 32 times on one core (measured).

    num_slots: experts that fit. base_s: attention and gate of a layer, sequence_s more for every sequence but the
    first. An expert takes `expert_s`, or `row_s` a token if that is more. predict_s: what a forecast takes after a
    gate, for policies that predict. The live memory forecasts on a thread of its own, so compute does not wait for it
    unless `predict_on_path`; the forecast only counts from then on. wake_s: what an expert that a step waited for costs
    beyond its compute: waking up, a call of its own. spread: of a layer's compute times, the standard deviation of
    their logarithm. Where it matters is beside prefetch: with layers that take always as long as each other, how many
    chunks fit beside one is a whole number, and 0.1 ms more or less of compute is up to an expert more or less.
    """

    num_slots: int
    expert_bytes: int
    link_bytes_per_s: float
    base_s: float = 1e-4
    sequence_s: float = 0.0
    expert_s: float = 1e-4
    row_s: float = 1e-5
    predict_s: float = 0.0
    predict_on_path: bool = False
    wake_s: float = 0.0
    spread: float = 0.0

    @property
    def load_s(self) -> float:
        """One expert over the link."""
        return self.expert_bytes / self.link_bytes_per_s

    def gate_s(self, num_sequences: int) -> float:
        """Attention and gate of a layer."""
        return self.base_s + (num_sequences - 1) * self.sequence_s

    def compute_s(self, rows: Sequence[int]) -> list[float]:
        """Of experts with so many tokens each."""
        return [max(self.expert_s, n * self.row_s) for n in rows]
