"""Leaves in the shared store what expert hosts say of their memories: the scheduler hears them, and it has the store.

Attention workers do the same for themselves (cluster/stats/statistics_loop.py). Knows reports and a store; no clock.
"""

from __future__ import annotations

from collections.abc import Iterable

from cluster.protocols import StateStore
from cluster.status.reports import HostReport

_EVERY_S = 10.0


class HostMemories:
    """What was said last of each host, every few seconds. Called by one thread."""

    def __init__(self, store: StateStore, fingerprint: str) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._due_s = float("-inf")

    def keep(self, reports: Iterable[HostReport], now_s: float) -> None:
        """Leave the last reports, if it is time to.

        Raises:
            ConnectionError: the store is away.
        """
        if now_s < self._due_s:
            return
        for report in reports:
            if report.memory is not None:
                self._store.report_owner(self._fingerprint, report.host_id, report.memory)
        self._due_s = now_s + _EVERY_S
