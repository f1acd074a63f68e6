"""The statistics loop: what the gates chose goes to the shared store, in batches, off the token path.

Knows counts and a store; knows nothing of steps. The engine's thread only adds to its own arrays;
this thread reads them now and then and sends the differences.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import numpy as np

from cluster.observability.logs import log_event
from cluster.protocols import StateStore

_LOG = logging.getLogger(__name__)
_INTERVAL_S = 2.0


class StatisticsLoop:
    """Sends activation counts of one worker; a store that is away delays counts and nothing else."""

    def __init__(self, store: StateStore, fingerprint: str, *, interval_s: float = _INTERVAL_S) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._interval_s = interval_s
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    @property
    def degraded(self) -> tuple[str, ...]:
        """Why statistics are not shared now, in words; empty when they are."""
        if self._error is not None:
            return (f"statistics store: {self._error}",)
        return () if self._store.is_shared else (f"statistics store: {self._store.description}",)

    def start(self, counts: Mapping[int, np.ndarray]) -> None:
        """Send `counts` (by layer, (num_experts,) int64, growing) from now on."""
        sent = {layer: np.zeros_like(values) for layer, values in counts.items()}
        self._thread = threading.Thread(target=self._run, args=(counts, sent), name="statistics", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Send what is left and end."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join(timeout=5)

    def _run(self, counts: Mapping[int, np.ndarray], sent: dict[int, np.ndarray]) -> None:
        while not self._stop.wait(self._interval_s):
            self._flush(counts, sent)
        self._flush(counts, sent)

    def _flush(self, counts: Mapping[int, np.ndarray], sent: dict[int, np.ndarray]) -> None:
        now = {layer: values.copy() for layer, values in counts.items()}
        deltas = {
            layer: {int(e): int(values[e] - sent[layer][e]) for e in np.flatnonzero(values - sent[layer])}
            for layer, values in now.items()
        }
        deltas = {layer: changed for layer, changed in deltas.items() if changed}
        try:
            self._store.ping()
            if deltas:
                self._store.add_activations(self._fingerprint, deltas)
        except ConnectionError as error:
            if self._error is None:
                log_event(_LOG, logging.WARNING, "statistics store unreachable", reason=str(error))
            self._error = str(error)
            return
        except Exception as error:  # noqa: BLE001 - top loop: counts may be lost, serving must go on
            log_event(_LOG, logging.ERROR, "statistics flush failed", reason=repr(error))
            return
        self._error = None
        sent.update(now)
