"""Keeps counting while the shared store is away.

Exact counts go to the primary store. While it cannot be reached they gather in memory (one number per
expert, so bounded) and go out when it answers again. Everything else goes through: statistics stay
with the worker that counted them until they are taken, and states will be newer by then. Knows the
`StateStore` protocol and a clock; knows neither Redis nor threads of its own: recovery is noticed by
the next call.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

from cluster.protocols import PolicyStateShare, StateStore, VersionedState
from cluster.semantics.statistics import ExpertStatistics
from cluster.stats.activation_counts import Counts, Deltas, add_counts, copy_counts

T = TypeVar("T")


class FallbackStore:
    """A `StateStore` whose activations count without fail; everything else may raise `ConnectionError`.

    Safe to use from several threads.

    After a failure the primary is tried again at most once per `probe_interval_s`, so that a dead
    server costs its timeout once per interval and not once per call.
    """

    def __init__(
        self, primary: StateStore, *, probe_interval_s: float = 2.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        self._primary = primary
        self._probe_interval_s = probe_interval_s
        self._clock = clock
        self._talking = threading.Lock()  # held while the primary is being called
        self._counting = threading.Lock()  # guards the two dicts; never held across a call
        self._pending: dict[str, Counts] = {}
        self._known: dict[str, Counts] = {}
        self._reason: str | None = None
        self._next_probe_s = 0.0

    @property
    def description(self) -> str:
        """The primary's, and what is wrong with it."""
        reason = self._reason
        return self._primary.description + (f" (degraded: {reason})" if reason else "")

    @property
    def is_shared(self) -> bool:
        """Whether other processes see now what is written now."""
        return self._primary.is_shared and self._reason is None

    @property
    def degraded(self) -> str | None:
        """Why statistics are not being shared at the moment, in words; None when all is well."""
        reason = self._reason
        return f"statistics store unreachable, counting in memory: {reason}" if reason else None

    def ping(self) -> None:
        """Probe the primary if a probe is due, and send what has gathered.

        Raises:
            ConnectionError: the primary is away.
        """
        if self._may_call():
            with self._talking:
                if self._try(self._primary.ping):
                    self._flush()
        if self._reason is not None:
            raise ConnectionError(self._reason)

    def add_activations(self, fingerprint: str, deltas: Deltas) -> None:
        """Add counts; they reach the primary now or when it is back."""
        with self._counting:
            add_counts(self._pending.setdefault(fingerprint, {}), deltas)
        if self._may_call() and self._talking.acquire(blocking=False):  # if not, a later call sends it
            try:
                self._flush()
            finally:
                self._talking.release()

    def activations(self, fingerprint: str) -> Counts:
        """Total counts; while degraded, those last read plus what was counted here since."""
        if self._may_call():
            with self._talking:
                self._flush()
                if self._may_call():
                    self._try(lambda: self._read(fingerprint))
        with self._counting:
            counts = copy_counts(self._known.get(fingerprint, {}))
            add_counts(counts, self._pending.get(fingerprint, {}))
        return counts

    def publish_policy_state(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        """Through to the primary; a share under way holds nobody up."""
        self._through(lambda: self._primary.publish_policy_state(fingerprint, name, owner, blob, weight))

    def read_policy_states(self, fingerprint: str, name: str) -> list[PolicyStateShare]:
        """The primary's."""
        return self._through(lambda: self._primary.read_policy_states(fingerprint, name))

    def add_statistics(
        self, fingerprint: str, delta: ExpertStatistics, prompts: Sequence[bytes], *, half_life_s: float
    ) -> None:
        """Through to the primary."""
        self._through(lambda: self._primary.add_statistics(fingerprint, delta, prompts, half_life_s=half_life_s))

    def statistics(self, fingerprint: str, clusters_version: int, *, half_life_s: float) -> ExpertStatistics | None:
        """The primary's."""
        return self._through(lambda: self._primary.statistics(fingerprint, clusters_version, half_life_s=half_life_s))

    def recent_prompts(self, fingerprint: str) -> list[bytes]:
        """The primary's."""
        return self._through(lambda: self._primary.recent_prompts(fingerprint))

    def take_fence(self, fingerprint: str) -> None:
        """Through to the primary."""
        self._through(lambda: self._primary.take_fence(fingerprint))

    def put_state(self, fingerprint: str, name: str, blob: bytes, version: int) -> bool:
        """Through to the primary."""
        return self._through(lambda: self._primary.put_state(fingerprint, name, blob, version))

    def get_state(self, fingerprint: str, name: str) -> VersionedState | None:
        """The primary's."""
        return self._through(lambda: self._primary.get_state(fingerprint, name))

    def _through(self, call: Callable[[], T]) -> T:
        results: list[T] = []
        if not self._may_call() or not self._try(lambda: results.append(call())):
            raise ConnectionError(self._reason)
        return results[0]

    def _may_call(self) -> bool:
        return self._reason is None or self._clock() >= self._next_probe_s

    def _read(self, fingerprint: str) -> None:
        counts = self._primary.activations(fingerprint)
        with self._counting:
            self._known[fingerprint] = counts

    def _flush(self) -> None:
        """Send everything pending; what fails is pending again."""
        with self._counting:
            batch, self._pending = self._pending, {}
        for fingerprint, deltas in batch.items():
            sent = self._may_call() and self._try(lambda f=fingerprint, d=deltas: self._primary.add_activations(f, d))
            with self._counting:
                add_counts((self._known if sent else self._pending).setdefault(fingerprint, {}), deltas)

    def _try(self, call: Callable[[], None]) -> bool:
        try:
            call()
        except ConnectionError as error:
            self._reason = str(error)
            self._next_probe_s = self._clock() + self._probe_interval_s
            return False
        self._reason = None
        return True
