"""A host's memory follows what workers expect, and nothing that makes no sense."""

from __future__ import annotations

import time
from collections.abc import Iterator

import numpy as np
import pytest
from expert_builders import ExpertFile, open_store, write_experts
from live_server import poll

from actors.expert_host.outlooks import HostOutlooks
from actors.experts.memory.store import ExpertStore
from cluster.policies.eviction.lru import LruScorer
from cluster.policies.eviction.score_snapshot import ScoreSnapshot
from cluster.policies.outlook import encode_outlook


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), layers=2, num_experts=4)


@pytest.fixture
def scores(experts: ExpertFile) -> ScoreSnapshot:
    size = len(experts.layout.experts)
    return ScoreSnapshot(LruScorer(size), size)


@pytest.fixture
def store(experts: ExpertFile, scores: ScoreSnapshot) -> Iterator[ExpertStore]:
    opened = open_store(experts, slots=3, scorer=scores)
    yield opened
    opened.close()


@pytest.fixture
def outlooks(store: ExpertStore, scores: ScoreSnapshot) -> Iterator[HostOutlooks]:
    listening = HostOutlooks()
    listening.start(store, scores)
    yield listening
    listening.close()


def _use(store: ExpertStore, *indices: int) -> None:
    for index in indices:
        layer, expert = store.form.expert(index)
        for _ in store.acquire(layer, [expert]):
            pass


def _resident(store: ExpertStore) -> set[int]:
    return set(np.flatnonzero(np.concatenate([store.resident(layer) for layer in store.grid.layers])).tolist())


def _say(store: ExpertStore, outlooks: HostOutlooks, worker: str, **of_experts: dict[int, float]) -> None:
    said: dict[str, np.ndarray | None] = {"values": None, "ahead": None}
    for name, values in of_experts.items():
        array = said[name] = np.zeros(store.grid.size, np.float32)
        array[list(values)] = list(values.values())
    heard = outlooks.num_heard
    outlooks.hear(worker, encode_outlook(np.ones(store.grid.size, np.bool_), said["values"], said["ahead"]))
    poll(lambda: outlooks.num_heard > heard, deadline_s=10, what="an outlook that was heard")


def test_what_workers_value_most_stays(store: ExpertStore, scores: ScoreSnapshot, outlooks: HostOutlooks) -> None:
    _use(store, 0, 1, 2)  # by recency 0 would leave
    _say(store, outlooks, "a", values={0: 3.0, 1: 2.0})
    _say(store, outlooks, "b", values={1: 3.0, 2: 1.0})
    poll(lambda: scores.scores()[2] > 0, deadline_s=10, what="what both said")

    _use(store, 3)

    assert _resident(store) == {0, 1, 3}


def test_what_workers_expect_is_fetched_ahead(store: ExpertStore, outlooks: HostOutlooks) -> None:
    _use(store, 0, 1, 2)
    _say(store, outlooks, "a", values={0: 1.0}, ahead={4: 1.0})

    poll(lambda: 4 in _resident(store), deadline_s=10, what="expert 4")
    assert 0 in _resident(store)


def test_worker_that_has_gone_leaves_no_wishes(
    store: ExpertStore, scores: ScoreSnapshot, outlooks: HostOutlooks
) -> None:
    _say(store, outlooks, "a", values={0: 1.0})
    poll(lambda: scores.scores().any(), deadline_s=10, what="its values")

    outlooks.forget("a")

    poll(lambda: not scores.scores().any(), deadline_s=10, what="that nothing is said any more")


def test_silent_worker_fades(store: ExpertStore, scores: ScoreSnapshot) -> None:
    now_s = 0.0
    listening = HostOutlooks(clock=lambda: now_s)
    listening.start(store, scores)
    try:
        _say(store, listening, "a", values={0: 1.0})
        poll(lambda: scores.scores().any(), deadline_s=10, what="its values")
        now_s = 1000.0
        poll(lambda: not scores.scores().any(), deadline_s=10, what="that it has faded")
    finally:
        listening.close()


def test_nonsense_is_dropped_and_the_next_word_is_heard(store: ExpertStore, outlooks: HostOutlooks) -> None:
    outlooks.hear("a", b"nonsense")
    poll(lambda: outlooks.num_dropped == 1, deadline_s=10, what="nonsense that was dropped")

    _say(store, outlooks, "a", ahead={4: 1.0})

    poll(lambda: 4 in _resident(store), deadline_s=10, what="expert 4")


def test_flood_is_dropped_and_nothing_waits(store: ExpertStore, outlooks: HostOutlooks) -> None:
    data = encode_outlook(np.ones(store.grid.size, np.bool_), np.ones(store.grid.size), None)
    began_s = time.monotonic()
    for _ in range(5000):
        outlooks.hear("a", data)
    assert time.monotonic() - began_s < 5

    outlooks.close()
    outlooks.hear("a", data)  # nobody listens, and nobody minds
