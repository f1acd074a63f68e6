"""Statistics in this process's memory: for tests, and when no Redis can be had.

Knows counts and shares; knows no other process, so nothing is shared and all is gone at exit.
"""

from __future__ import annotations

import threading

from cluster.protocols import LearnedShare
from cluster.stats.activation_counts import Counts, Deltas, add_counts, copy_counts
from cluster.stats.learned_shares import MAX_SHARES, check_size


class MemoryStore:
    """A `StateStore` in a dict; safe to use from several threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: dict[str, Counts] = {}
        self._shares: dict[tuple[str, str], dict[str, LearnedShare]] = {}  # owners, last published last

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

    def publish_learned(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """Keep a worker's share."""
        check_size(name, blob)
        with self._lock:
            shares = self._shares.setdefault((fingerprint, name), {})
            shares.pop(owner, None)
            shares[owner] = LearnedShare(owner, weight, blob)
            if len(shares) > MAX_SHARES:
                del shares[next(iter(shares))]

    def read_learned(self, fingerprint: str, name: str) -> list[LearnedShare]:
        """Shares, the last published first."""
        with self._lock:
            return [*reversed(self._shares.get((fingerprint, name), {}).values())]
