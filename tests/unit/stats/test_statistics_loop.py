"""The statistics loop sends every count once, whatever the store does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest

from actors.statistics_loop import StatisticsLoop
from cluster.stats.activation_counts import Counts, Deltas
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.memory_store import MemoryStore
from cluster.types import Phase

PREFILL, DECODE = Phase
DEADLINE_S = 5.0


class _Store(MemoryStore):
    """Shared, and away when told so; counts calls and says when one was made."""

    def __init__(self) -> None:
        super().__init__()
        self.away: str | None = None
        self.added: list[Deltas] = []
        self.called = threading.Event()

    @property
    def is_shared(self) -> bool:
        return True

    def ping(self) -> None:
        self.called.set()
        if self.away:
            raise ConnectionError(self.away)

    def add_activations(self, fingerprint: str, deltas: Deltas) -> None:
        self.called.set()
        if self.away:
            raise ConnectionError(self.away)
        self.added.append(deltas)
        super().add_activations(fingerprint, deltas)

    def wait_for_calls(self, number: int = 2) -> None:
        """With two, a flush began after this was called and has ended."""
        for _ in range(number):
            self.called.clear()
            assert self.called.wait(DEADLINE_S)


def _counts() -> dict[int, np.ndarray]:
    return {layer: np.zeros((2, 4), dtype=np.int64) for layer in (0, 7)}


def test_only_what_changed_goes_out_and_once() -> None:
    counts, store = _counts(), _Store()
    loop = StatisticsLoop(store, "f", interval_s=0.005)
    loop.start(counts)
    counts[7][0] += (0, 5, 0, 0)
    store.wait_for_calls()
    counts[7][1] += (0, 1, 0, 2)
    loop.stop()

    totals: Counts = {PREFILL: {7: {1: 5}}, DECODE: {7: {1: 1, 3: 2}}}
    assert store.activations("f") == totals
    assert len(store.added) == 2, "the second has no part of the first"
    assert store.added[1] == {DECODE: totals[DECODE]}
    assert loop.num_flushes > 0
    assert loop.flush_cpu_s > 0


@pytest.mark.parametrize("wrap", [lambda store: store, lambda store: FallbackStore(store, probe_interval_s=0.0)])
def test_counts_of_the_time_away_arrive_later(
    wrap: Callable[[_Store], _Store | FallbackStore], caplog: pytest.LogCaptureFixture
) -> None:
    counts, store = _counts(), _Store()
    loop = StatisticsLoop(wrap(store), "f", interval_s=0.005)
    loop.start(counts)
    store.wait_for_calls()
    assert loop.degraded == ()

    store.away = "gone"
    for _ in range(2):
        counts[0][1][2] += 10
        store.wait_for_calls()
    (reason,) = loop.degraded
    assert "statistics store" in reason and "gone" in reason
    assert store.added == []

    store.away = None
    store.wait_for_calls()
    assert loop.degraded == ()
    loop.stop()

    assert store.activations("f") == {DECODE: {0: {2: 20}}}
    assert [record.levelname for record in caplog.records].count("WARNING") == 1, "said once, not at every flush"


def test_store_that_is_not_shared_is_named() -> None:
    loop = StatisticsLoop(MemoryStore(), "f")

    (reason,) = loop.degraded
    assert "not shared" in reason


def test_flushes_take_a_bounded_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """A model whose flush takes a second of processor time is sent every 200 s."""
    clock = iter(range(1000))
    monkeypatch.setattr("actors.statistics_loop.time.thread_time", lambda: float(next(clock)))
    waits: list[float] = []
    counts, store = _counts(), _Store()
    loop = StatisticsLoop(store, "f", interval_s=2.0)

    class _Stop:
        def wait(self, wait_s: float) -> bool:
            waits.append(wait_s)
            return len(waits) == 3

    monkeypatch.setattr(loop, "_stop", _Stop())
    loop._run(counts, {layer: np.zeros_like(values) for layer, values in counts.items()})

    assert waits == [2.0, 200.0, 200.0]
