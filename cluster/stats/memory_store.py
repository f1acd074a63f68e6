"""Statistics in this process's memory: for tests, and when no Redis can be had.

Knows counts, shares and states; knows no other process, so nothing is shared and all is gone at exit.
"""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Sequence

from cluster.protocols import PolicyStateShare, VersionedState
from cluster.semantics.statistics import ExpertStatistics
from cluster.stats.activation_counts import Counts, Deltas, add_counts, copy_counts
from cluster.stats.decayed_totals import DecayedTotals
from cluster.stats.policy_state_shares import MAX_SHARES, check_size
from cluster.stats.recent_prompts import MAX_PROMPTS, checked_prompts


class MemoryStore:
    """A `StateStore` in a dict; safe to use from several threads."""

    def __init__(self, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._counts: dict[str, Counts] = {}
        self._shares: dict[tuple[str, str], dict[str, PolicyStateShare]] = {}  # owners, last published last
        self._totals: dict[str, DecayedTotals] = {}
        self._prompts: dict[str, deque[bytes]] = {}  # the latest first
        self._states: dict[tuple[str, str], VersionedState] = {}

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

    def publish_policy_state(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """Keep a worker's share."""
        check_size(name, blob)
        with self._lock:
            shares = self._shares.setdefault((fingerprint, name), {})
            shares.pop(owner, None)
            shares[owner] = PolicyStateShare(owner, weight, blob)
            if len(shares) > MAX_SHARES:
                del shares[next(iter(shares))]

    def read_policy_states(self, fingerprint: str, name: str) -> list[PolicyStateShare]:
        """Shares, the last published first."""
        with self._lock:
            return [*reversed(self._shares.get((fingerprint, name), {}).values())]

    def add_statistics(
        self, fingerprint: str, delta: ExpertStatistics, prompts: Sequence[bytes], *, half_life_s: float
    ) -> None:
        """Add activations counted just now."""
        checked = checked_prompts(prompts)
        with self._lock:
            totals = self._totals.setdefault(fingerprint, DecayedTotals())
            totals.add(delta, half_life_s=half_life_s, now_s=self._clock())
            self._prompts.setdefault(fingerprint, deque(maxlen=MAX_PROMPTS)).extendleft(checked)

    def statistics(self, fingerprint: str, clusters_version: int, *, half_life_s: float) -> ExpertStatistics | None:
        """Decayed sums as of now."""
        with self._lock:
            totals = self._totals.get(fingerprint)
            return totals and totals.read(clusters_version, half_life_s=half_life_s, now_s=self._clock())

    def recent_prompts(self, fingerprint: str) -> list[bytes]:
        """Embeddings of the last prompts, the latest first."""
        with self._lock:
            return [*self._prompts.get(fingerprint, ())]

    def take_fence(self, fingerprint: str) -> None:
        """Nothing to do: no other process writes here."""

    def put_state(self, fingerprint: str, name: str, blob: bytes, version: int) -> bool:
        """Keep a state unless it is older than what is kept."""
        with self._lock:
            kept = self._states.get((fingerprint, name))
            if kept is not None and kept.version >= version:
                return False
            self._states[fingerprint, name] = VersionedState(version, blob)
            return True

    def get_state(self, fingerprint: str, name: str) -> VersionedState | None:
        """The state of the highest version."""
        with self._lock:
            return self._states.get((fingerprint, name))
