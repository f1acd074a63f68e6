"""Two workers, one real Valkey: each shows what both counted, also what they counted while the server was gone."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from cluster.protocols import StateStore
from cluster.semantics.statistics import no_statistics
from cluster.stats.cluster_counts import ClusterCounts
from cluster.stats.embedded_valkey import start_embedded_valkey
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.redis_store import RedisStore
from cluster.stats.statistics_loop import StatisticsLoop
from cluster.status.experts import ClusterActivations
from cluster.types import Phase

NUM_EXPERTS = 3
DEADLINE_S = 20.0


class _Worker:
    """What an attention worker has of statistics."""

    def __init__(self, url: str) -> None:
        self.store: StateStore = FallbackStore(RedisStore(url, timeout_s=0.5), probe_interval_s=0.02)
        self.counts = {0: np.zeros((2, NUM_EXPERTS), dtype=np.int64)}
        self.statistics = no_statistics(0, 0, (0,), NUM_EXPERTS)
        self.loop = StatisticsLoop(self.store, "f", interval_s=0.02)
        self.loop.start(self)

    def drain_prompts(self) -> list[bytes]:
        return []

    def page(self) -> ClusterActivations:
        return asyncio.run(ClusterCounts(self.store, "f").read((0,), NUM_EXPERTS))


def test_pages_of_all_workers_show_the_sum(tmp_path: Path) -> None:
    server = start_embedded_valkey(tmp_path)
    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    first, second = workers = [_Worker(server.url), _Worker(server.url)]

    def shows(prefill: tuple[int, ...], decode: tuple[int, ...]) -> bool:
        pages = [worker.page() for worker in workers]
        rows = {Phase.PREFILL: prefill, Phase.DECODE: decode}
        return all(page.degraded is None and page.layers[0].activations == rows for page in pages)

    try:
        first.counts[0] += ((1, 0, 0), (0, 2, 0))
        second.counts[0] += ((4, 0, 0), (0, 0, 3))
        _wait_until(lambda: shows((5, 0, 0), (0, 2, 3)))

        server.stop()
        first.counts[0][1] += (10, 0, 0)
        _wait_until(lambda: all(worker.loop.degraded for worker in workers))
        page = first.page()
        assert page.degraded is not None and str(port) in page.degraded
        assert page.layers[0].activations[Phase.PREFILL] == (5, 0, 0), "the last ones known"

        server = start_embedded_valkey(tmp_path, port)  # it kept nothing
        _wait_until(lambda: shows((5, 0, 0), (10, 2, 3)))
    finally:
        for worker in workers:
            worker.loop.stop()
        server.stop()


def _wait_until(claim: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < end_s
        time.sleep(0.02)
