"""What a scheduler consists of besides its memory of reports: who learns of prompts, and who keeps the placement."""

from __future__ import annotations

from typing import Protocol

from cluster.control.roster import Roster
from cluster.placement.plan import Placement, PlacementPlan
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import ExpertStatistics
from cluster.status.scheduler import PlacementLine


class ClusterLearner(Protocol):
    """Makes knowledge from the shared statistics. Raises ConnectionError while they cannot be read."""

    @property
    def statistics(self) -> ExpertStatistics | None:
        """The last that were read."""
        ...

    def learn(self, version: int, *, top_k: int, seen_clusters: int) -> Knowledge | None:
        """What is known now, as `version`; None if it is not worth telling: there is none, or it has hardly changed."""
        ...


class Placer(Protocol):
    """Keeps the placement of experts on hosts. Thread-safe."""

    @property
    def placement(self) -> Placement | None:
        """The published one; None: hosts have the one they start with."""
        ...

    def turn(self, roster: Roster, now_s: float) -> None:
        """Restore, plan and begin to migrate, whatever is due."""
        ...

    def plan(self, roster: Roster, now_s: float, *, statistics: ExpertStatistics | None) -> PlacementPlan:
        """What would be done now, by these statistics. Raises Unavailable: not enough is known."""
        ...

    def line(self, now_s: float) -> PlacementLine:
        """For pages."""
        ...

    def close(self) -> None:
        """End what runs in the background."""
        ...
