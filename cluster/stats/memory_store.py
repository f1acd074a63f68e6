"""Statistics in this process's memory: for tests, and when no Redis can be had.

Knows counts; knows no other process, so nothing is shared and all is gone at exit.
"""

from __future__ import annotations

import threading

from cluster.stats.activation_counts import Counts, Deltas, add_counts, copy_counts


class MemoryStore:
    """A `StateStore` in a dict; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counts] = {}

    @property
    def description(self) -> str:
        """For people."""
        return "in-memory (degraded: not shared)"

    @property
    def is_shared(self) -> bool:
        """Never: other processes see nothing of it."""
        return False

    def ping(self) -> None:
        """Always answers."""

    def add_activations(self, fingerprint: str, deltas: Deltas) -> None:
        """Add counts to those of the model `fingerprint`."""
        with self._lock:
            add_counts(self._counts.setdefault(fingerprint, {}), deltas)

    def activations(self, fingerprint: str) -> Counts:
        """Total counts of the model `fingerprint`."""
        with self._lock:
            return copy_counts(self._counts.get(fingerprint, {}))
