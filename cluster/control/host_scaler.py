"""Brings the number of expert hosts to what the load wants, and spreads them: starts some, empties and ends others.

How many is decided in cluster/scaling/rules.py; that a host which leaves has given its experts away before it is
ended is the placement's doing. A start is a named actor: where no node has room for it, Ray's autoscaler hears of it.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection

from cluster.control.roster import Roster
from cluster.logs import log_event
from cluster.placement.plan import Placement
from cluster.scaling.rules import Scale, ScalingRules, follow, hosts_load, wanted_hosts
from cluster.scaling.spread import emptiest_node, is_uneven, surplus_host
from cluster.status.reports import HostReport, WorkerReport
from cluster.types import StartupPhase

_LOG = logging.getLogger(__name__)
_LOOK_S = 10.0  # the load is what was done in so long
_SETTLED = (StartupPhase.READY, StartupPhase.FAILED)
_START_TIMEOUT_S = 120.0  # after which a host that was started and never reported is started anew


class HostScaler:
    """One cluster's. Called by one thread.

    leaving: indices of hosts that are to be emptied and ended.
    """

    def __init__(
        self,
        rules: ScalingRules,
        *,
        start: Callable[[int, str | None], None],
        stop: Callable[[int], None],
        nodes: Callable[[], Collection[str]] = tuple,
    ) -> None:
        """Args: start: a host by its index, on a node if one is named. stop: by its index. Both are harmless when
        repeated. nodes: ids of those that can have hosts."""
        self.leaving: frozenset[int] = frozenset()
        self._rules = rules
        self._start, self._stop, self._nodes = start, stop, nodes
        self._scale: Scale | None = None
        self._started: dict[int, float] = {}  # when; until they report
        self._looked_s: float | None = None
        self._hosts: dict[int, HostReport] = {}
        self._workers: dict[str, WorkerReport] = {}

    def turn(self, roster: Roster, placement: Placement, now_s: float) -> None:
        """Follow the load, one step at a time. Hosts of a node that is emptied count as gone: others take over."""
        reporting = {report.index: report for report, _ in roster.hosts(now_s)}
        self._started = {
            index: at_s
            for index, at_s in self._started.items()
            if index not in reporting and now_s - at_s < _START_TIMEOUT_S
        }
        there = set(reporting) | set(placement.hosts) | set(self._started)
        for index in sorted(self.leaving):
            if not any(placement.hosts.get(index, {}).values()):
                log_event(_LOG, logging.INFO, "expert host ends: it is empty", host=index)
                self._stop(index)
                self.leaving -= {index}
                there.discard(index)
        if self._scale is None:
            self._scale = Scale(len(there))
        is_due = self._looked_s is None or now_s - self._looked_s >= _LOOK_S
        if is_due:
            self._look(reporting, roster, now_s)
        self._follow(there, reporting, roster, now_s, may_spread=is_due)

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

    def _follow(
        self, there: set[int], reporting: dict[int, HostReport], roster: Roster, now_s: float, *, may_spread: bool
    ) -> None:
        assert self._scale is not None
        target = self._scale.target
        drained = {index for index, report in reporting.items() if roster.is_draining(report.node_id)}
        staying = there - self.leaving - drained
        node_of = {index: reporting[index].node_id for index in staying if index in reporting}
        if len(staying) < target and self.leaving - drained:
            self.leaving -= {min(self.leaving - drained)}
        elif len(staying) < target:
            usable = frozenset(self._nodes()) - roster.draining
            if usable or not drained:  # else it would start where it may not stay
                self._start_on(emptiest_node(usable, node_of), there, target, now_s)
        elif self._started or any(report.phase not in _SETTLED for report in reporting.values()):
            return  # whoever takes over is not there yet
        elif len(staying) > target:
            index = surplus_host(sorted(staying), node_of)
            log_event(_LOG, logging.INFO, "expert host leaves", host=index, wanted=target)
            self.leaving |= {index}
        elif may_spread and not self.leaving:
            usable = frozenset(self._nodes()) - roster.draining
            if is_uneven(usable, node_of):  # one more there; then the fullest node has one too many
                self._start_on(emptiest_node(usable, node_of), there, target, now_s)

    def _start_on(self, node: str | None, there: set[int], target: int, now_s: float) -> None:
        index = next(i for i in range(len(there) + 1) if i not in there)
        log_event(_LOG, logging.INFO, "expert host starts", host=index, wanted=target, node=node or "any")
        self._start(index, node)
        self._started[index] = now_s
