"""What a diagnosis of placement, replication and semantic routing found. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from cluster.placement.snapshot import Snapshot
from cluster.types import Phase


@dataclass(frozen=True, slots=True, kw_only=True)
class PhaseDiagnosis:
    """One phase. Means over the layers that were used; `max_over_mean_worst` of the worst layer.

    reliability: of the spread, the share that is not chance. persistence: of it, what the next period repeats (None:
    not known). balance_now: hosts, as placed. balance_then: by share of spare room for replicas.
    """

    phase: Phase
    regime: str
    activations: float
    max_over_mean: float
    max_over_mean_worst: float
    gini: float
    reliability: float
    persistence: float | None
    balance_now: float
    balance_then: Mapping[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class SemanticDiagnosis:
    """Misses of workers that each get their own kinds of prompt, over those of workers that get all, by cache share."""

    num_kinds: int
    num_workers: int
    mutual_information: float | None
    misses: Mapping[float, float]


@dataclass(frozen=True, slots=True, kw_only=True)
class Diagnosis:
    """What was found, and what to do about it in words. scored: on a period that was not planned on.

    num_hosts: 0: workers have the experts. balance_now: of all phases together, as the plan says it. snapshot: of a
    running server.
    """

    scored: bool
    phases: tuple[PhaseDiagnosis, ...]
    semantic: SemanticDiagnosis | None
    advice: tuple[str, ...]
    num_hosts: int = 0
    balance_now: float | None = None
    snapshot: Snapshot | None = None

    def as_dict(self) -> dict[str, Any]:
        """JSON's types only."""
        found: dict[str, Any] = asdict(self)
        for phase in found["phases"]:
            phase["balance_then"] = {f"{share:g}": value for share, value in phase["balance_then"].items()}
        if found["semantic"] is not None:
            misses = found["semantic"]["misses"]
            found["semantic"]["misses"] = {f"{share:g}": value for share, value in misses.items()}
        return found
