"""Cluster-wide counts for pages: cached, bounded, and never an exception."""

from __future__ import annotations

import asyncio
import threading

from cluster.stats.activation_counts import Counts
from cluster.stats.cluster_counts import ClusterCounts
from cluster.stats.memory_store import MemoryStore
from cluster.types import Phase

PREFILL, DECODE = Phase


class _Store(MemoryStore):
    """Answers when `gate` is open; fails with `error`."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = threading.Event()
        self.gate.set()
        self.error: Exception | None = None
        self.num_reads = 0

    @property
    def is_shared(self) -> bool:
        return True

    def activations(self, fingerprint: str) -> Counts:
        self.num_reads += 1
        assert self.gate.wait(10)
        if self.error is not None:
            raise self.error
        return super().activations(fingerprint)


def test_layers_and_experts_without_counts_are_zero() -> None:
    store = _Store()
    store.add_activations("f", {DECODE: {3: {1: 5}}})
    store.add_activations("other", {DECODE: {3: {1: 99}}})

    view = asyncio.run(ClusterCounts(store, "f").read((2, 3), 3))

    assert view.degraded is None
    assert [layer.layer for layer in view.layers] == [2, 3]
    assert view.layers[0].activations == {PREFILL: (0, 0, 0), DECODE: (0, 0, 0)}
    assert view.layers[1].activations == {PREFILL: (0, 0, 0), DECODE: (0, 5, 0)}


def test_readers_at_once_and_soon_after_share_one_read() -> None:
    store = _Store()

    async def scenario() -> None:
        counts = ClusterCounts(store, "f", max_age_s=60.0)
        await asyncio.gather(*(counts.read((0,), 1) for _ in range(5)))
        await counts.read((0,), 1)

    asyncio.run(scenario())
    assert store.num_reads == 1


def test_hanging_store_costs_its_timeout_and_one_thread() -> None:
    store = _Store()
    store.add_activations("f", {PREFILL: {0: {0: 4}}})

    async def scenario() -> None:
        counts = ClusterCounts(store, "f", max_age_s=0.0, timeout_s=0.02)
        counts_before = (await counts.read((0,), 1)).layers
        store.gate.clear()
        for _ in range(3):
            late = await counts.read((0,), 1)
            assert late.degraded is not None and "did not answer within 0.02 s" in late.degraded
            assert late.layers == counts_before, "the last ones known"
        assert store.num_reads == 2
        store.gate.set()
        counts = ClusterCounts(store, "f", max_age_s=0.0, timeout_s=5.0)
        assert (await counts.read((0,), 1)).degraded is None

    asyncio.run(scenario())


def test_failing_store_is_shown_and_the_last_counts_kept() -> None:
    store = _Store()
    store.add_activations("f", {PREFILL: {0: {0: 4}}})

    async def scenario() -> None:
        counts = ClusterCounts(store, "f", max_age_s=0.0)
        await counts.read((0,), 1)
        store.error = ConnectionError("redis://h:1: gone")
        view = await counts.read((0,), 1)
        assert view.degraded == "redis://h:1: gone"
        assert view.layers[0].activations[PREFILL] == (4,)
        store.error = None
        assert (await counts.read((0,), 1)).degraded is None

    asyncio.run(scenario())


def test_store_of_one_process_is_not_passed_off_as_the_cluster() -> None:
    view = asyncio.run(ClusterCounts(MemoryStore(), "f").read((0,), 1))

    assert view.degraded == MemoryStore().description
