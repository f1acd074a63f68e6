"""A real Valkey between workers: a fresh one starts with what the others learned, also after the server was gone."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from stateful_policies import LearnedMean, states_of

from cluster.policies.expert_maps.store import MapStore
from cluster.policies.signals import Grid
from cluster.stats.embedded_valkey import start_embedded_valkey
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.policy_state_loop import PolicyStateLoop
from cluster.stats.redis_store import RedisStore

DEADLINE_S = 20.0
GRID = Grid(layers=(0, 1), num_experts=4, top_k=2)
MAPS = np.array([[[0.7, 0.1, 0.1, 0.1], [0.4, 0.3, 0.2, 0.1]], [[0.1, 0.2, 0.3, 0.4], [0.25, 0.25, 0.25, 0.25]]])


class _Worker:
    """What an attention worker has of policy state. `start` returns when it may say that it is ready."""

    def __init__(self, url: str, owner: str) -> None:
        self.store = FallbackStore(RedisStore(url, timeout_s=0.5), probe_interval_s=0.02)
        self.part = LearnedMean()
        self.maps = MapStore(GRID, dim=2, capacity=10)
        self.loop = PolicyStateLoop(self.store, "f", owner, interval_s=0.02)

    def start(self) -> _Worker:
        self.loop.start(states_of(mean=self.part, maps=self.maps))
        return self


def test_a_fresh_worker_starts_warm(tmp_path: Path) -> None:
    server = start_embedded_valkey(tmp_path)
    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    first = _Worker(server.url, "w1")
    first.maps.insert(np.eye(2), MAPS)  # from its file, say
    first.start()
    try:
        assert first.part.num_seen == 0
        first.part.learn(4.0, times=10)
        _wait_until(lambda: first.loop.num_published == 2)

        second = _Worker(server.url, "w2").start()
        assert (second.part.mean, second.part.num_seen) == (4.0, 10)
        np.testing.assert_allclose(second.maps.to_arrays()["maps"], MAPS, rtol=1e-3)
        second.part.learn(1.0, times=5)
        second.loop.stop()  # at its end it leaves what it learned since
        third = _Worker(server.url, "w3").start()
        assert third.part.num_seen == 10 + 15
        third.loop.stop()

        server.stop()
        began_s = time.monotonic()
        cold = _Worker(server.url, "w4").start()
        assert time.monotonic() - began_s < 5
        assert cold.part.num_seen == 0
        cold.loop.stop()

        server = start_embedded_valkey(tmp_path, port)  # it kept nothing
        first.part.learn(4.0)
        _wait_until(lambda: _answers(first.store) and first.loop.num_published == 3)
        fresh = _Worker(server.url, "w5").start()
        assert (fresh.part.mean, fresh.part.num_seen) == (4.0, 11)
        fresh.loop.stop()
    finally:
        first.loop.stop()
        server.stop()


def _answers(store: FallbackStore) -> bool:
    try:
        store.ping()
    except ConnectionError:
        return False
    return True


def _wait_until(claim: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < end_s
        time.sleep(0.02)
