"""Cluster-wide activation counts for pages: read from the shared store off the event loop, bounded and cached.

Knows a store and a clock; knows nothing of pages. A store that hangs costs a reader `timeout_s` and one thread,
however many read.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence

from cluster.protocols import StateStore
from cluster.stats.activation_counts import Counts
from cluster.status.experts import ClusterActivations, LayerActivations
from cluster.types import Phase


class ClusterCounts:
    """The last counts read, read again when they are older than `max_age_s`. For one event loop."""

    def __init__(self, store: StateStore, fingerprint: str, *, max_age_s: float = 1.0, timeout_s: float = 1.0) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._max_age_s = max_age_s
        self._timeout_s = timeout_s
        self._counts: Counts = {}
        self._error: str | None = None
        self._reading: asyncio.Task[None] | None = None
        self._read_at_s = float("-inf")

    async def read(self, layers: Sequence[int], num_experts: int) -> ClusterActivations:
        """Counts of `layers`, at most `max_age_s` old, or older with the reason; never raises."""
        late = await self._refresh()
        degraded = late or self._error or (None if self._store.is_shared else self._store.description)
        return ClusterActivations(
            layers=tuple(_layer_activations(self._counts, layer, num_experts) for layer in layers),
            degraded=degraded,
        )

    async def _refresh(self) -> str | None:
        """Read again if it is time to; why the counts are old, if they are."""
        if self._reading is None:
            if time.monotonic() - self._read_at_s < self._max_age_s:
                return None
            self._reading = asyncio.create_task(self._read())
        done, _ = await asyncio.wait({self._reading}, timeout=self._timeout_s)
        return None if done else f"{self._store.description} did not answer within {self._timeout_s:g} s"

    async def _read(self) -> None:
        try:
            self._counts = await asyncio.to_thread(self._store.activations, self._fingerprint)
            self._error = None
        except Exception as error:  # noqa: BLE001 - a page shows what went wrong; nothing else depends on it
            self._error = str(error) or repr(error)
        finally:
            self._read_at_s = time.monotonic()
            self._reading = None


def _layer_activations(counts: Counts, layer: int, num_experts: int) -> LayerActivations:
    rows = {phase: counts.get(phase, {}).get(layer, {}) for phase in Phase}
    return LayerActivations(
        layer=layer,
        activations={phase: tuple(row.get(e, 0) for e in range(num_experts)) for phase, row in rows.items()},
    )
