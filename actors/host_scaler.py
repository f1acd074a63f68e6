"""Brings the number of expert hosts to what the load wants: starts some, empties and ends others.

How many is decided in cluster/scheduler/scaling.py; that a host which leaves has given its experts away before it is
ended is the placement's doing. A start is a named actor: where no node has room for it, Ray's autoscaler hears of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

from cluster.observability.logs import log_event
from cluster.scheduler.plan import Placement
from cluster.scheduler.reports import HostReport, WorkerReport
from cluster.scheduler.roster import Roster
from cluster.scheduler.scaling import Scale, ScalingRules, follow, hosts_load, wanted_hosts

_LOG = logging.getLogger(__name__)
_LOOK_S = 10.0  # the load is what was done in so long


class HostScaler:
    """One cluster's. Called by one thread.

    leaving: indices of hosts that are to be emptied and ended.
    """

    def __init__(self, rules: ScalingRules, *, start: Callable[[int], None], stop: Callable[[int], None]) -> None:
        """Args: start, stop: a host by its index; harmless when repeated."""
        self.leaving: frozenset[int] = frozenset()
        self._rules = rules
        self._start, self._stop = start, stop
        self._scale: Scale | None = None
        self._started: set[int] = set()
        self._looked_s: float | None = None
        self._hosts: dict[int, HostReport] = {}
        self._workers: dict[str, WorkerReport] = {}

    def turn(self, roster: Roster, placement: Placement, now_s: float) -> None:
        """Follow the load, one step at a time."""
        reporting = {report.index: report for report, _ in roster.hosts(now_s)}
        self._started -= set(reporting)
        there = set(reporting) | set(placement.hosts) | self._started
        for index in sorted(self.leaving):
            if not any(placement.hosts.get(index, {}).values()):
                log_event(_LOG, logging.INFO, "expert host ends: it is empty", host=index)
                self._stop(index)
                self.leaving -= {index}
                there.discard(index)
        if self._scale is None:
            self._scale = Scale(len(there))
        if self._looked_s is None or now_s - self._looked_s >= _LOOK_S:
            self._look(reporting, roster, now_s)
        self._follow(there)

    def _look(self, reporting: dict[int, HostReport], roster: Roster, now_s: float) -> None:
        assert self._scale is not None
        workers = {report.worker_id: report for report, _ in roster.workers(now_s)}
        if self._looked_s is not None:
            load = hosts_load(
                {index: (self._hosts[index], after) for index, after in reporting.items() if index in self._hosts},
                {key: (self._workers[key], after) for key, after in workers.items() if key in self._workers},
                now_s - self._looked_s,
            )
            wanted = wanted_hosts(self._scale.target, load, self._rules)
            self._scale = follow(self._scale, wanted, now_s, self._rules)
        self._looked_s, self._hosts, self._workers = now_s, reporting, workers

    def _follow(self, there: set[int]) -> None:
        assert self._scale is not None
        staying, target = there - self.leaving, self._scale.target
        if len(staying) < target and self.leaving:
            self.leaving -= {min(self.leaving)}
        elif len(staying) < target:
            index = next(i for i in range(len(there) + 1) if i not in there)
            log_event(_LOG, logging.INFO, "expert host starts", host=index, wanted=target)
            self._start(index)
            self._started.add(index)
        elif len(staying) > target:
            index = max(staying)
            log_event(_LOG, logging.INFO, "expert host leaves", host=index, wanted=target)
            self.leaving |= {index}
