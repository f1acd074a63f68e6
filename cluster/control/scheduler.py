"""The central scheduler: hears workers and hosts, knows what was learned of prompts, says who is to hold what.

A plain class around pure decisions: clock, store and whoever carries plans out are given to it. What it must remember
is in the store (statistics, clusters, the placement, nodes being emptied), what is current comes with the next reports:
it may be killed at any time, and until it is back everybody goes on with the last they have.

Exchanges never wait for the store: `turn` talks to it, on a thread of its own, and hands over finished values.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from typing import TypeVar

from cluster.config.sections import SchedulerConfig
from cluster.control.host_scaler import HostScaler
from cluster.control.moment import Moment, Moments
from cluster.control.roster import Roster
from cluster.control.scheduler_protocols import ClusterLearner, Placer
from cluster.control.status_lines import drain_line, host_line, knowledge_line, worker_line
from cluster.errors import NothingToChange, Superseded
from cluster.finite import with_finite_numbers
from cluster.logs import log_event
from cluster.placement.plan import PlacementPlan
from cluster.placement.snapshot import Snapshot
from cluster.protocols import StateStore
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import ExpertStatistics
from cluster.status.diagnosis import Diagnosis
from cluster.status.reports import HostReport, RoutingView, WorkerDirectives, WorkerReport
from cluster.status.scheduler import DrainLine, PlacementLine, SchedulerStatus
from cluster.types import StartupPhase

_LOG = logging.getLogger(__name__)
_SILENCE_S = 10.0  # without a report, after which a process is forgotten
_LEARN_EVERY_S = 3.0
_LEARN_SHARE = 0.02  # of the time, at most: the statistics of a large model are megabytes
_DRAINING = "draining"

Value = TypeVar("Value")


class Scheduler:
    """One cluster's. Safe for any number of threads."""

    def __init__(
        self,
        config: SchedulerConfig,
        *,
        fingerprint: str,
        store: StateStore,
        learner: ClusterLearner,
        placer: Placer | None,
        scaler: HostScaler | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args: placer: None: experts stay where they are, or there are no hosts. scaler: None: so do hosts."""
        self._config = config
        self._fingerprint = fingerprint
        self._store = store
        self._learner = learner
        self._placer = placer
        self._scaler = scaler
        self._clock = clock
        self._lock = threading.Lock()
        self._roster = Roster(silence_s=max(_SILENCE_S, _SILENCE_S * config.report_interval_s))
        self._began_s = clock()
        self._knowledge: Knowledge | None = None
        self._known: ExpertStatistics | None = None  # what it was made from
        self._known_s = self._began_s
        self._moments = Moments()
        self._seen_version = 0  # of knowledge that somebody has: numbers are not used twice
        self._seen_clusters = 0
        self._learn_s = self._began_s
        self._drain_version: int | None = None  # None until it was read
        self._drains_changed = False  # since they were remembered
        self._store_problem: str | None = None
        self._has_fence = False
        self._superseded: str | None = None

    def report_worker(self, report: WorkerReport) -> WorkerDirectives:
        """Take a worker's report; what is news to it."""
        report = _sound(report, report.worker_id)
        with self._lock:
            self._roster.note_worker(report, self._clock())
            self._seen_version = max(self._seen_version, report.knowledge_version)
            self._seen_clusters = max(self._seen_clusters, report.clusters_version)
            knowledge, is_draining = self._knowledge, self._roster.is_draining(report.node_id)
        placement = self._placer.placement if self._placer is not None else None
        if report.phase not in (StartupPhase.READY, StartupPhase.DRAINING):
            return WorkerDirectives(is_draining=is_draining)
        return WorkerDirectives(
            knowledge=_if(knowledge, lambda it: it.version > report.knowledge_version),
            placement=_if(placement, lambda it: it.epoch > report.placement_epoch),
            is_draining=is_draining,
        )

    def report_host(self, report: HostReport) -> None:
        """Take a host's report."""
        report = _sound(report, report.host_id)
        with self._lock:
            self._roster.note_host(report, self._clock())

    def routing_view(self, known_version: int) -> RoutingView:
        """The workers now, and knowledge if it is newer than `known_version`."""
        with self._lock:
            self._seen_version = max(self._seen_version, known_version)
            knowledge = _if(self._knowledge, lambda it: it.version > known_version)
            return self._roster.routing_view(knowledge, self._clock())

    def turn(self) -> None:
        """What is due in the background. Call once a second or so, from one thread; it takes as long as the store."""
        now_s = self._clock()
        with self._lock:
            silent = self._roster.forget_silent(now_s)
        for process in silent:
            log_event(_LOG, logging.WARNING, "a process no longer reports", process=process)
        if self._superseded is not None:  # what it would decide is another's to decide
            return
        try:
            if not self._has_fence:
                self._store.take_fence(self._fingerprint)
                self._has_fence = True
            self._remember_drains()
            if now_s >= self._learn_s and self._learn():
                took_s = self._clock() - now_s
                self._learn_s = now_s + max(_LEARN_EVERY_S, took_s / _LEARN_SHARE)
            self._place(now_s)
            self._store_problem = None
        except ConnectionError as error:
            self._store_problem = str(error)
        except Superseded as error:
            self._superseded = error.message
            log_event(_LOG, logging.ERROR, "this scheduler decides nothing more", reason=error.message)

    def status(self) -> SchedulerStatus:
        """What the scheduler knows, for pages: reports as they are, all else of the moment that `snapshot` names."""
        owned = self._owned()
        by_host = {} if isinstance(owned, str) else owned
        moment, now_s = self._moment(), self._clock()
        knowledge, line = moment.knowledge, PlacementLine(epoch=0)
        if self._placer is not None:
            line = replace(self._placer.line(now_s), balance=self._moments.balance(moment), epoch=moment.stamp.epoch)
        with self._lock:
            roster = self._roster
            return SchedulerStatus(
                uptime_s=now_s - self._began_s,
                routing=self._config.routing,
                placement_mode=self._config.placement,
                workers=tuple(worker_line(r, age_s, roster) for r, age_s in roster.workers(now_s)),
                hosts=tuple(host_line(r, age_s, roster, by_host.get(r.index)) for r, age_s in roster.hosts(now_s)),
                knowledge=None if knowledge is None else knowledge_line(knowledge, now_s - self._known_s),
                placement=line,
                drains=tuple(drain_line(node, roster, owned, now_s) for node in sorted(roster.draining)),
                degraded=self._degraded(),
                snapshot=moment.stamp,
            )

    def plan(self) -> PlacementPlan:
        """What placement would change now; nothing is changed.

        Raises:
            NothingToChange: there are no expert hosts. Unavailable: not enough is known yet.
        """
        if self._placer is None:
            raise NothingToChange("nothing is placed: there are no expert hosts, or scheduler.placement is fixed")
        return self._moments.plan(self._moment(), self._placer)

    def diagnose(self) -> Diagnosis:
        """What routing and placement could gain.

        Raises:
            Unavailable: no statistics yet.
        """
        return self._moments.diagnosis(self._moment())

    def drain(self, node_id: str) -> DrainLine:
        """Empty a node: its workers take nothing new, its hosts' experts move away."""
        return self._set_draining(node_id, is_draining=True)

    def undrain(self, node_id: str) -> DrainLine:
        """Use a node again."""
        return self._set_draining(node_id, is_draining=False)

    @property
    def draining(self) -> frozenset[str]:
        """Ids of nodes that are being emptied."""
        return self._roster.draining

    def close(self) -> None:
        """End what runs in the background."""
        if self._placer is not None:
            self._placer.close()

    def _learn(self) -> bool:
        """Look for something new; False if nobody has said yet what model this is."""
        with self._lock:
            version = 1 + max(self._seen_version, self._knowledge.version if self._knowledge else 0)
            seen_clusters, top_k = self._seen_clusters, self._roster.top_k
        if not top_k:
            return False
        knowledge = self._learner.learn(version, top_k=top_k, seen_clusters=seen_clusters)
        if knowledge is not None:
            with self._lock:
                self._knowledge, self._known_s = knowledge, self._clock()
                self._known = self._learner.statistics
        return True

    def _place(self, now_s: float) -> None:
        """Hosts come and go first, then the placement follows."""
        if self._placer is None:
            return
        placement = self._placer.placement
        if self._scaler is not None and placement is not None:
            self._scaler.turn(self._snapshot(), placement, now_s)
            with self._lock:
                self._roster.leaving = self._scaler.leaving
        self._placer.turn(self._snapshot(), now_s)

    def _moment(self) -> Moment:
        """What is known now, or was a moment ago: plan, status and diagnosis of one moment have the same numbers."""
        placement = self._placer.placement if self._placer is not None else None
        now_s = self._clock()
        with self._lock:
            moment = Moment(
                stamp=Snapshot(number=0, uptime_s=now_s - self._began_s, epoch=placement.epoch if placement else 0),
                now_s=now_s,
                roster=self._roster.copy(),
                statistics=self._learner.statistics,
                knowledge=self._knowledge,
                known=self._known,
                placement=placement,
                half_life_s=self._config.half_life_s,
            )
        return self._moments.at(moment)

    def _snapshot(self) -> Roster:
        with self._lock:
            return self._roster.copy()

    def _set_draining(self, node_id: str, *, is_draining: bool) -> DrainLine:
        now_s = self._clock()
        with self._lock:
            change = frozenset((node_id,))
            draining = self._roster.draining
            self._roster.set_draining(draining | change if is_draining else draining - change)
            self._drains_changed = True
        log_event(_LOG, logging.INFO, "node drains" if is_draining else "node is used again", node=node_id)
        return drain_line(node_id, self._snapshot(), self._owned(), now_s)

    def _remember_drains(self) -> None:
        """Read what was remembered, unless somebody has said otherwise since; leave what they said."""
        if self._drain_version is None:
            state = self._store.get_state(self._fingerprint, _DRAINING)
            with self._lock:
                if state is not None and not self._drains_changed:
                    self._roster.set_draining(json.loads(state.blob))
            self._drain_version = state.version if state is not None else 0
        with self._lock:
            is_changed, draining = self._drains_changed, sorted(self._roster.draining)
            self._drains_changed = False
        if is_changed:
            self._drain_version += 1
            try:
                blob = json.dumps(draining).encode()
                self._store.put_state(self._fingerprint, _DRAINING, blob, self._drain_version)
            except ConnectionError:
                self._drains_changed = True
                raise

    def _owned(self) -> dict[int, int] | str:
        """Experts by host that the placement gives it; or why hosts keep what they have."""
        if self._placer is None:
            return "its experts stay: scheduler.placement is fixed"
        placement = self._placer.placement
        if placement is None:
            return "which experts it has is not known yet"
        return {i: sum(map(len, own.values())) for i, own in placement.hosts.items()}

    def _degraded(self) -> tuple[str, ...]:
        problem = self._store_problem or (None if self._store.is_shared else self._store.description)
        found = () if problem is None else (f"statistics store: {problem}",)
        return (
            found if self._superseded is None else (*found, f"placement and learning stand still: {self._superseded}")
        )


def _sound(report: Value, owner: str) -> Value:
    """The report, with what is no number as not measured."""
    sound = with_finite_numbers(report)
    if sound is not report:
        log_event(_LOG, logging.WARNING, "a report had numbers that are not finite: taken as not measured", owner=owner)
    return sound


def _if(value: Value | None, condition: Callable[[Value], bool]) -> Value | None:
    """The value, where there is one and it is news."""
    return value if value is not None and condition(value) else None
