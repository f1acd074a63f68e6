"""The statistics loop: what the gates chose goes to the shared store, in batches, off the token path.

Knows counts and a store; knows nothing of steps. The engine's thread only adds to its own arrays;
this thread reads them now and then and sends the differences.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Mapping

import numpy as np

from cluster.observability.logs import log_event
from cluster.protocols import StateStore
from cluster.stats.activation_counts import Counts
from cluster.types import Phase

_LOG = logging.getLogger(__name__)
_INTERVAL_S = 2.0
_MAX_SHARE = 0.005  # of one core, whatever the number of experts: a larger model is sent less often


class StatisticsLoop:
    """Sends activation counts of one worker; a store that is away delays counts and nothing else.

    `num_flushes` and their `flush_cpu_s` (processor time) are since start; the next is due after `wait_s`.
    """

    def __init__(self, store: StateStore, fingerprint: str, *, interval_s: float = _INTERVAL_S) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self.num_flushes = 0
        self.flush_cpu_s = 0.0
        self.wait_s = interval_s
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why statistics are not shared now, in words; empty when they are."""
        reason = self._reason()
        return (f"statistics store: {reason}",) if reason is not None else ()

    def start(self, counts: Mapping[int, np.ndarray]) -> None:
        """Send `counts` (by layer, (2 phases, num_experts) int64, growing) from now on."""
        sent = {layer: np.zeros_like(values) for layer, values in counts.items()}
        self._thread = threading.Thread(target=self._run, args=(counts, sent), name="statistics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send what is left and end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self, counts: Mapping[int, np.ndarray], sent: dict[int, np.ndarray]) -> None:
        while not self._stop.wait(self.wait_s):
            began = time.thread_time()
            self._flush(counts, sent)
            cost_s = time.thread_time() - began
            self.num_flushes += 1
            self.flush_cpu_s += cost_s
            self.wait_s = max(self._interval_s, cost_s / _MAX_SHARE)
        self._flush(counts, sent)

    def _flush(self, counts: Mapping[int, np.ndarray], sent: dict[int, np.ndarray]) -> None:
        was_shared = self._reason() is None
        now = {layer: values.copy() for layer, values in counts.items()}
        deltas = _deltas(now, sent)
        try:
            if deltas:
                self._store.add_activations(self._fingerprint, deltas)
                sent.update(now)
            else:
                self._store.ping()
            self._error = None
        except ConnectionError as error:
            self._error = str(error)
        except Exception as error:  # noqa: BLE001 - top loop: counts may be lost, serving must go on
            log_event(_LOG, logging.ERROR, "statistics flush failed", reason=repr(error))
        if was_shared and (reason := self._reason()) is not None:
            log_event(_LOG, logging.WARNING, "statistics are not shared", reason=reason)

    def _reason(self) -> str | None:
        return self._error or (None if self._store.is_shared else self._store.description)


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
