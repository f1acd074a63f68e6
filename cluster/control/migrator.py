"""Carries migrations out: asks hosts where they are, lets the decisions say what to tell them, and tells them.

One thread. Hosts are called through `HostsControl`, with deadlines; cluster/placement/migration.py decides. It runs
also while nothing is to move: a host that starts anew, or joins, is brought to the published placement.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

from cluster.logs import log_event
from cluster.periodic import Pace, PeriodicLoop
from cluster.placement.migration import HostCommand, HostEpochs, Migration, MigrationPhase
from cluster.placement.plan import Placement

_LOG = logging.getLogger(__name__)
_BUSY_POLL_S = 0.1
_IDLE_POLL_S = 2.0
_WORKER_TIMEOUT_S = 10.0
_CLOSE_TIMEOUT_S = 10.0


class HostsControl(Protocol):
    """Expert hosts by index. Calls end within a few seconds; a host that does not answer is None."""

    def indices(self) -> Sequence[int]:
        """Hosts that there are, placed or not."""
        ...

    def epochs(self, indices: Sequence[int]) -> Mapping[int, HostEpochs | None]:
        """What each host says now."""
        ...

    def tell(self, commands: Sequence[HostCommand]) -> Mapping[int, HostEpochs | None]:
        """Tell every host what concerns it; what each says then."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class MigrationStatus:
    """The migration under way, or the last one. epoch: of the published placement. Bytes: of it, on all hosts.

    reason: why it was given up.
    """

    phase: MigrationPhase
    epoch: int
    reason: str
    stages_left: int
    planned_bytes: int
    moved_bytes: int
    seconds: float


class MigrationRunner:
    """Brings all hosts to one placement after the other."""

    def __init__(
        self,
        hosts: HostsControl,
        placement: Placement,
        *,
        on_publish: Callable[[Placement], None],
        worker_epochs: Callable[[], Mapping[str, int]],
        bytes_per_s: float,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        placement: the published one, as it is remembered, or the one that hosts start with.
        on_publish: told of every placement that takes effect, before hosts are: remember it, then hand it to workers.
        worker_epochs: `placement_epoch` of each worker that reports.
        bytes_per_s: what hosts may load together for a migration.
        """
        self._hosts = hosts
        self._on_publish, self._worker_epochs = on_publish, worker_epochs
        self._clock = clock
        self._migration = Migration(placement, bytes_per_s=bytes_per_s, worker_timeout_s=_WORKER_TIMEOUT_S)
        self._observed: Mapping[int, HostEpochs | None] = {}
        self._moved: dict[tuple[str, int], int] = {}
        self._began_s = self._ended_s = clock()
        self._lock = threading.Lock()
        self._loop = PeriodicLoop(
            lambda: _BUSY_POLL_S if self.turn() else _IDLE_POLL_S, Pace("migration", interval_s=_IDLE_POLL_S)
        )

    @property
    def placement(self) -> Placement:
        """The one that is published."""
        return self._migration.published

    def begin(self) -> None:
        """Watch hosts from now on."""
        self._loop.start()

    def start(self, target: Placement, *, capacities: Mapping[int, int], expert_bytes: int) -> bool:
        """Begin to go to `target`; False if a migration is under way or there is nothing to do.

        Its epoch does not matter: what gets published is numbered here, in several epochs where memory is tight.

        Args: capacities: experts that each host holds (HostReport.capacity).
        """
        if not self._observed:
            self._look()
        with self._lock:
            now_s = self._clock()
            is_begun = self._migration.start(
                target, capacities, hosts=self._observed, expert_bytes=expert_bytes, now_s=now_s
            )
            if is_begun:
                self._moved, self._began_s = {}, now_s
        self._loop.soon()
        return is_begun

    def abort(self, reason: str) -> None:
        """Give up what is not published yet."""
        with self._lock:
            if self._migration.is_under_way:
                self._ended_s = self._clock()
            self._migration.abort(reason)
        self._loop.soon()

    def status(self) -> MigrationStatus:
        """How far it is."""
        with self._lock:
            migration = self._migration
            until_s = self._clock() if migration.is_under_way else self._ended_s
            return MigrationStatus(
                phase=migration.phase,
                epoch=migration.published.epoch,
                reason=migration.reason,
                stages_left=migration.num_stages_left,
                planned_bytes=migration.planned_bytes,
                moved_bytes=sum(self._moved.values()),
                seconds=until_s - self._began_s,
            )

    def turn(self) -> bool:
        """Look at the hosts once and tell them what is next; whether there is more to do soon."""
        self._look()
        workers = self._worker_epochs()
        with self._lock:
            was_published, was_under_way = self._migration.published, self._migration.is_under_way
            commands = self._migration.advance(self._clock(), self._observed, workers)
            published, is_under_way = self._migration.published, self._migration.is_under_way
            if was_under_way and not is_under_way:
                self._ended_s = self._clock()
                phase, reason = self._migration.phase, self._migration.reason
                level = logging.WARNING if phase is MigrationPhase.ABORTED else logging.INFO
                log_event(_LOG, level, f"migration {phase}", epoch=published.epoch, reason=reason)
        if published is not was_published:
            self._on_publish(published)
        if commands:
            self._hosts.tell(commands)
        return bool(commands) or is_under_way

    def close(self) -> None:
        """Stop watching; what hosts have prepared stays until somebody settles it."""
        self._loop.stop(_CLOSE_TIMEOUT_S)

    def _look(self) -> None:
        self._observed = self._hosts.epochs(sorted({*self._migration.hosts, *self._hosts.indices()}))
        for said in self._observed.values():
            if said is not None and said.preparing and self._migration.is_under_way:
                self._moved[said.host_id, said.preparing] = said.moved_bytes
