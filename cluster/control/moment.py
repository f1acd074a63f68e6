"""The moment that the scheduler's pages are of: what was known together, kept for a little while, so that pages agree.

Knows reports, statistics, knowledge and the placement of one moment; changes nothing. What follows from it is pure.
"""

from __future__ import annotations

import threading
from collections.abc import Hashable
from dataclasses import dataclass, replace

from cluster.control.diagnose import diagnose
from cluster.control.planning_inputs import diagnosis_inputs
from cluster.control.roster import Roster
from cluster.control.scheduler_protocols import Placer
from cluster.errors import MoesaicError, Unavailable
from cluster.placement.plan import Placement, PlacementPlan
from cluster.placement.planner import present_balance
from cluster.placement.snapshot import Snapshot
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import ExpertStatistics
from cluster.status.diagnosis import Diagnosis

_LASTS_S = 2.0  # longer than it takes to ask for one page after the other


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Moment:
    """What was known together. known: what `knowledge` was made from."""

    stamp: Snapshot
    now_s: float
    roster: Roster
    statistics: ExpertStatistics | None
    knowledge: Knowledge | None
    known: ExpertStatistics | None
    placement: Placement | None
    half_life_s: float

    @property
    def key(self) -> Hashable:
        """What changes the answers at once; loads and rates only drift."""
        roster = self.roster
        hosts = tuple((report.host_id, report.phase) for report, _ in roster.hosts(self.now_s))
        workers = tuple(report.worker_id for report, _ in roster.workers(self.now_s))
        nodes = (roster.draining, roster.returning, roster.leaving)
        version = self.knowledge.version if self.knowledge is not None else 0
        return hosts, workers, nodes, version, self.stamp.epoch, id(self.statistics)

    def diagnosis(self) -> Diagnosis:
        """Raises Unavailable: no statistics yet."""
        if self.statistics is None:
            raise Unavailable("there are no statistics yet; send some requests, or see why the store is away")
        inputs = diagnosis_inputs(
            self.roster,
            self.statistics,
            self.placement,
            half_life_s=self.half_life_s,
            kinds=self.known,
            mutual_information=None if self.knowledge is None else self.knowledge.mutual_information,
            now_s=self.now_s,
        )
        return replace(diagnose(inputs), snapshot=self.stamp)

    def balance(self) -> float | None:
        """Largest over mean load of the hosts, as the plan and the diagnosis of this moment say it; None: not known."""
        if self.statistics is None or self.placement is None:
            return None
        inputs = diagnosis_inputs(
            self.roster,
            self.statistics,
            self.placement,
            half_life_s=self.half_life_s,
            kinds=None,
            mutual_information=None,
            now_s=self.now_s,
        )
        return present_balance(inputs.placement)


class Moments:
    """The newest moment, and what was worked out for it. Safe for any number of threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._moment: Moment | None = None
        self._diagnosis: Diagnosis | None = None
        self._plan: PlacementPlan | MoesaicError | None = None
        self._balance: tuple[float | None] | None = None

    def at(self, moment: Moment) -> Moment:
        """The moment that pages are of: the last one while it lasts and nothing decisive has changed, else this one."""
        with self._lock:
            last = self._moment
            if last is not None and moment.now_s - last.now_s < _LASTS_S and last.key == moment.key:
                return last
            number = 1 if last is None else last.stamp.number + 1
            self._moment = moment = replace(moment, stamp=replace(moment.stamp, number=number))
            self._diagnosis = self._plan = self._balance = None
            return moment

    def plan(self, moment: Moment, placer: Placer) -> PlacementPlan:
        """What would be done at a moment. Raises Unavailable: not enough was known."""
        found = self._plan if moment is self._moment else None
        if found is None:
            try:
                found = replace(
                    placer.plan(moment.roster, moment.now_s, statistics=moment.statistics), snapshot=moment.stamp
                )
            except MoesaicError as error:
                found = error
            with self._lock:
                if moment is self._moment:
                    self._plan = found
        if isinstance(found, MoesaicError):
            raise found
        return found

    def diagnosis(self, moment: Moment) -> Diagnosis:
        """What routing and placement could gain at a moment. Raises Unavailable: no statistics then."""
        found = self._diagnosis if moment is self._moment else None
        if found is None:
            found = moment.diagnosis()
            with self._lock:
                if moment is self._moment:
                    self._diagnosis = found
        return found

    def balance(self, moment: Moment) -> float | None:
        """Largest over mean load of the hosts at a moment; None: not known."""
        found = self._balance if moment is self._moment else None
        if found is None:
            found = (moment.balance(),)
            with self._lock:
                if moment is self._moment:
                    self._balance = found
        return found[0]
