"""The statistics loop: what the gates chose goes to the shared store, in batches, off the token path.

Knows counts and a store; knows nothing of steps. The engine's thread only adds to its own arrays;
this thread reads them now and then and sends the differences.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from cluster.periodic import Pace, PeriodicLoop
from cluster.protocols import StateStore
from cluster.semantics.statistics import ExpertStatistics, no_statistics
from cluster.stats.activation_counts import Counts
from cluster.types import Phase

_INTERVAL_S = 2.0
_MAX_CPU_SHARE = 0.005  # of one core, whatever the number of experts: a larger model is sent less often
_STOP_TIMEOUT_S = 5.0
_MAX_PROMPTS = 32  # embeddings that wait for a store that is away


class Recorded(Protocol):
    """What a worker's recorder counts; arrays that grow while this thread reads them."""

    @property
    def counts(self) -> Mapping[int, np.ndarray]:
        """(2 phases, num_experts) int64 by layer."""
        ...

    @property
    def statistics(self) -> ExpertStatistics:
        """By cluster of prompts; another object when the clusters have changed, and then the last one is final."""
        ...

    def drain_prompts(self) -> list[bytes]:
        """Embeddings of some prompts since the last call."""
        ...


class StatisticsLoop:
    """Sends what one worker counts; a store that is away delays counts and nothing else."""

    def __init__(
        self,
        store: StateStore,
        fingerprint: str,
        *,
        half_life_s: float = 1800.0,
        interval_s: float = _INTERVAL_S,
    ) -> None:
        """Args: half_life_s: of statistics."""
        self._store = store
        self._fingerprint = fingerprint
        self._half_life_s = half_life_s
        self._interval_s = interval_s
        self._loop: PeriodicLoop | None = None
        self._was_shared = store.is_shared  # one that never was is no news

    @property
    def num_flushes(self) -> int:
        """Since start."""
        return self._loop.pace.num_turns if self._loop is not None else 0

    @property
    def flush_cpu_s(self) -> float:
        """Processor time of them all."""
        return self._loop.cpu_s if self._loop is not None else 0.0

    @property
    def wait_s(self) -> float:
        """Until the next flush, from the end of the last."""
        pause_s = self._loop.pause_s if self._loop is not None else None
        return self._interval_s if pause_s is None else pause_s

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why statistics are not shared now, in words; empty when they are."""
        reason = self._loop.pace.problem if self._loop is not None else None
        if reason is None and not self._store.is_shared:
            reason = self._store.description
        return (f"statistics store: {reason}",) if reason is not None else ()

    def start(self, recorded: Recorded) -> None:
        """Send what is recorded from now on."""
        sender = _Sender(self._store, self._fingerprint, recorded, self._half_life_s)
        self._loop = PeriodicLoop(
            lambda: self._flush(sender),
            Pace(
                "statistics",
                interval_s=self._interval_s,
                expected=(ConnectionError,),
                event="statistics are not shared",
            ),
            first_s=self._interval_s,
            max_cpu_share=_MAX_CPU_SHARE,
            ends_with_turn=True,
        )
        self._loop.start()

    def stop(self) -> None:
        """Send what is left and end."""
        if self._loop is not None:
            self._loop.stop(_STOP_TIMEOUT_S)

    def _flush(self, sender: _Sender) -> None:
        """Raises:
        ConnectionError: the store is away, or since then a memory of this process stands in for it.
        """
        if not sender.send():
            self._store.ping()
        if self._was_shared and not self._store.is_shared:
            raise ConnectionError(self._store.description)


class _Sender:
    """Knows what of a recorder's counts the store has."""

    def __init__(self, store: StateStore, fingerprint: str, recorded: Recorded, half_life_s: float) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._recorded = recorded
        self._half_life_s = half_life_s
        self._sent_counts = {layer: np.zeros_like(values) for layer, values in recorded.counts.items()}
        self._growing = recorded.statistics
        self._sent = _nothing_of(self._growing)
        self._prompts: list[bytes] = []

    def send(self) -> bool:
        """Send what is new; whether there was any. What the store does not take stays new.

        Raises:
            ConnectionError: the store is away.
        """
        now = {layer: values.copy() for layer, values in self._recorded.counts.items()}
        deltas = _deltas(now, self._sent_counts)
        if deltas:
            self._store.add_activations(self._fingerprint, deltas)
            self._sent_counts = now
        return self._send_statistics() or bool(deltas)

    def _send_statistics(self) -> bool:
        self._prompts = [*self._prompts, *self._recorded.drain_prompts()][-_MAX_PROMPTS:]
        present = self._recorded.statistics
        is_sent = self._send_grown()
        if present is not self._growing:  # of the last clusters everything is sent now
            self._growing, self._sent = present, _nothing_of(present)
            is_sent |= self._send_grown()
        return is_sent

    def _send_grown(self) -> bool:
        now = self._growing.copy()
        delta = now.minus(self._sent)
        if not self._prompts and not delta.values.any():
            return False
        self._store.add_statistics(self._fingerprint, delta, self._prompts, half_life_s=self._half_life_s)
        self._sent, self._prompts = now, []
        return True


def _nothing_of(statistics: ExpertStatistics) -> ExpertStatistics:
    version, layers = statistics.clusters_version, statistics.layers
    return no_statistics(version, statistics.num_clusters, layers, statistics.num_experts)


def _deltas(now: Mapping[int, np.ndarray], sent: Mapping[int, np.ndarray]) -> Counts:
    """What was counted since it was sent: only experts that were chosen."""
    deltas: Counts = {}
    for layer, values in now.items():
        for phase, changes in zip(Phase, values - sent[layer], strict=True):
            experts = np.flatnonzero(changes)
            if len(experts):
                deltas.setdefault(phase, {})[layer] = dict(
                    zip(experts.tolist(), changes[experts].tolist(), strict=True)
                )
    return deltas
