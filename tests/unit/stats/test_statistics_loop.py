"""The statistics loop sends every count once, whatever the store does meanwhile."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
import pytest

from cluster.semantics.statistics import COUNT, ExpertStatistics, no_statistics
from cluster.stats.activation_counts import Counts, Deltas
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.memory_store import MemoryStore
from cluster.stats.statistics_loop import StatisticsLoop
from cluster.types import Phase

PREFILL, DECODE = Phase
DEADLINE_S = 5.0


class _Store(MemoryStore):
    """Shared, and away when told so; counts calls and says when one was made."""

    def __init__(self) -> None:
        super().__init__()
        self.away: str | None = None
        self.added: list[Deltas] = []
        self.num_statistics = 0
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

    def add_statistics(
        self, fingerprint: str, delta: ExpertStatistics, prompts: Sequence[bytes], *, half_life_s: float
    ) -> None:
        self.called.set()
        if self.away:
            raise ConnectionError(self.away)
        self.num_statistics += 1
        super().add_statistics(fingerprint, delta, prompts, half_life_s=half_life_s)

    def wait_for_calls(self, number: int = 2) -> None:
        """With two, a flush began after this was called and has ended."""
        for _ in range(number):
            self.called.clear()
            assert self.called.wait(DEADLINE_S)


class _Recorded:
    """What a recorder has; grows when a test says so."""

    def __init__(self) -> None:
        self.counts = {layer: np.zeros((2, 4), dtype=np.int64) for layer in (0, 7)}
        self.statistics = no_statistics(0, 0, (0, 7), 4)
        self.prompts: list[bytes] = []

    def drain_prompts(self) -> list[bytes]:
        prompts, self.prompts = self.prompts, []
        return prompts


def test_only_what_changed_goes_out_and_once() -> None:
    recorded, store = _Recorded(), _Store()
    counts = recorded.counts
    loop = StatisticsLoop(store, "f", interval_s=0.005)
    loop.start(recorded)
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
    recorded, store = _Recorded(), _Store()
    counts = recorded.counts
    loop = StatisticsLoop(wrap(store), "f", interval_s=0.005)
    loop.start(recorded)
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
    monkeypatch.setattr("cluster.periodic.time.thread_time", lambda: float(next(clock)))
    loop = StatisticsLoop(_Store(), "f", interval_s=2.0)
    loop.start(_Recorded())
    waits = [loop.wait_s]
    for _ in range(2):
        assert loop._loop is not None
        loop._loop.turn()
        waits.append(loop.wait_s)
    loop.stop()

    assert waits == [2.0, 200.0, 200.0]
    assert (loop.num_flushes, loop.flush_cpu_s) == (3, 3.0), "and one for what is left"


def test_statistics_and_prompts_of_the_time_away_arrive_later_and_once() -> None:
    recorded, store = _Recorded(), _Store()
    loop = StatisticsLoop(store, "f", interval_s=0.005, half_life_s=1e9)
    loop.start(recorded)
    store.away = "gone"
    recorded.statistics.values[0, 1, 0, 2] += (3, 1.5)
    recorded.prompts = [b"first", b"second"]
    store.wait_for_calls()
    assert store.recent_prompts("f") == []

    store.away = None
    store.wait_for_calls()
    recorded.statistics.values[0, 1, 0, 2] += (1, 0.5)
    loop.stop()

    total = store.statistics("f", 0, half_life_s=1e9)
    assert total is not None
    assert total.values[0, 1, 0, 2] == pytest.approx([4, 2])
    assert total.values[..., COUNT].sum() == pytest.approx(4)
    assert store.recent_prompts("f") == [b"second", b"first"]
    assert store.num_statistics <= 3, "nothing new, nothing sent"


def test_what_was_counted_by_the_last_clusters_goes_there_and_the_rest_to_the_new() -> None:
    recorded, store = _Recorded(), _Store()
    loop = StatisticsLoop(store, "f", interval_s=0.005, half_life_s=1e9)
    loop.start(recorded)
    store.wait_for_calls()
    recorded.statistics.values[0, 1, 0, 2] += (3, 1.5)
    recorded.statistics = no_statistics(1, 2, (0, 7), 4)
    recorded.statistics.values[1, 1, 0, 2] += (5, 2.5)
    loop.stop()

    counts = [store.statistics("f", version, half_life_s=1e9) for version in (0, 1)]
    assert [None if total is None else total.values[:, 1, 0, 2].tolist() for total in counts] == [
        [pytest.approx([3, 1.5])],
        [[0, 0], pytest.approx([5, 2.5]), [0, 0]],
    ]
