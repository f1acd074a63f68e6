"""Which moment a number is of. Values only."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """A moment of the scheduler's knowledge: pages with the same one agree in every number.

    number: grows, and begins anew with the scheduler. uptime_s: of the scheduler. epoch: of the placement, 0: none.
    """

    number: int
    uptime_s: float
    epoch: int
