"""Who has reported lately, and which nodes are being emptied. Pure: the time comes with every call.

A report replaces the last one of the same process. One that has been silent for long is forgotten: the scheduler then
plans without it; whether a request still reaches it is for routers and Serve to find out.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.semantics.knowledge import Knowledge
from cluster.status.reports import HostReport, RoutingView, WorkerReport


class Roster:
    """Last reports by process. Times in seconds of the caller's clock.

    draining: ids of nodes that are to be emptied, returning: of those that were and are used again. leaving: indices of
    hosts that are to be emptied, wherever they run.
    """

    def __init__(self, *, silence_s: float) -> None:
        """Args: silence_s: whoever reported nothing for so long is forgotten."""
        self.draining: frozenset[str] = frozenset()
        self.returning: frozenset[str] = frozenset()
        self.leaving: frozenset[int] = frozenset()
        self._silence_s = silence_s
        self._workers: dict[str, tuple[WorkerReport, float]] = {}
        self._hosts: dict[int, tuple[HostReport, float]] = {}

    def note_worker(self, report: WorkerReport, now_s: float) -> None:
        """A worker has reported."""
        self._workers[report.worker_id] = (report, now_s)

    def note_host(self, report: HostReport, now_s: float) -> None:
        """A host has reported; a new incarnation takes the place of the old one."""
        self._hosts[report.index] = (report, now_s)

    def forget_silent(self, now_s: float) -> tuple[str, ...]:
        """Drop those that have been silent for too long; their ids."""
        workers = [key for key, (_, at_s) in self._workers.items() if now_s - at_s > self._silence_s]
        hosts = [key for key, (_, at_s) in self._hosts.items() if now_s - at_s > self._silence_s]
        lost_hosts = tuple(self._hosts.pop(key)[0].host_id for key in hosts)
        for key in workers:
            del self._workers[key]
        return (*workers, *lost_hosts)

    def workers(self, now_s: float) -> tuple[tuple[WorkerReport, float], ...]:
        """Last reports and their ages, in order of id."""
        return tuple((report, now_s - at_s) for _, (report, at_s) in sorted(self._workers.items()))

    def hosts(self, now_s: float) -> tuple[tuple[HostReport, float], ...]:
        """Last reports and their ages, in order of index."""
        return tuple((report, now_s - at_s) for _, (report, at_s) in sorted(self._hosts.items()))

    @property
    def top_k(self) -> int:
        """Experts per token of the model that is served; 0 while no worker has said so."""
        return max((report.top_k for report, _ in self._workers.values()), default=0)

    def is_draining(self, node_id: str) -> bool:
        """Whether what runs there is to take nothing new."""
        return node_id in self.draining

    def is_leaving(self, report: HostReport) -> bool:
        """Whether a host is to own nothing."""
        return report.index in self.leaving or self.is_draining(report.node_id)

    def set_draining(self, node_ids: Iterable[str]) -> None:
        """Empty these nodes from now on, and no others."""
        draining = frozenset(node_ids)
        self.returning = (self.returning | self.draining) - draining
        self.draining = draining

    def routing_view(self, knowledge: Knowledge | None, now_s: float) -> RoutingView:
        """What routers decide by. Args: knowledge: None where the router has it already."""
        workers = tuple((r, age_s) for r, age_s in self.workers(now_s) if not self.is_draining(r.node_id))
        return RoutingView(workers=workers, knowledge=knowledge)

    def copy(self) -> Roster:
        """As it is now, for whoever decides at leisure."""
        other = Roster(silence_s=self._silence_s)
        other.draining, other.returning, other.leaving = self.draining, self.returning, self.leaving
        other._workers, other._hosts = dict(self._workers), dict(self._hosts)
        return other
