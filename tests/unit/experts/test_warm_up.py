"""A fresh expert memory takes in what the cluster used most, within its budget and in time, and serves in any case."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from expert_builders import ExpertFile, HeldLink, open_store, write_experts

from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore
from actors.experts.memory.warm_up import warm_up
from cluster.protocols import StateStore
from cluster.stats.memory_store import MemoryStore
from cluster.types import Phase

FINGERPRINT = "model"
COUNTS = {0: {0: 10, 1: 50, 2: 1}, 1: {0: 40, 3: 30, 5: 20}}
MOST_USED = [(0, 1), (1, 0), (1, 3), (1, 5), (0, 0), (0, 2)]  # layer, expert


class StoreAway(MemoryStore):
    """Shared statistics that cannot be reached."""

    def activations(self, fingerprint: str) -> dict[Phase, dict[int, dict[int, int]]]:
        raise ConnectionError("redis://away does not answer")


@pytest.fixture
def file(tmp_path: Path) -> ExpertFile:
    return write_experts(tmp_path)


@pytest.fixture
def statistics() -> StateStore:
    store = MemoryStore()
    store.add_activations(FINGERPRINT, {Phase.DECODE: COUNTS, Phase.PREFILL: {0: {4: 900}}})
    return store


@pytest.fixture
def small(file: ExpertFile) -> Iterator[ExpertStore]:
    store = open_store(file, slots=3)
    yield store
    store.close()


def _resident(store: ExpertStore) -> set[tuple[int, int]]:
    return {(layer, int(expert)) for layer in store.grid.layers for expert in store.resident(layer).nonzero()[0]}


def test_what_decoding_used_most_is_there_within_the_budget(small: ExpertStore, statistics: StateStore) -> None:
    assert warm_up(small, statistics, FINGERPRINT) == 3
    assert _resident(small) == set(MOST_USED[:3])


def test_the_most_used_leaves_last(small: ExpertStore, statistics: StateStore) -> None:
    warm_up(small, statistics, FINGERPRINT)
    for _ in small.acquire(0, [4]):
        pass
    assert _resident(small) == {*MOST_USED[:2], (0, 4)}


def test_room_for_all_takes_in_only_what_was_used(file: ExpertFile, statistics: StateStore) -> None:
    store = open_store(file, slots=12)
    assert warm_up(store, statistics, FINGERPRINT) == len(MOST_USED)
    assert _resident(store) == set(MOST_USED)
    store.close()


def test_prompts_count_where_nothing_was_decoded_yet(small: ExpertStore) -> None:
    statistics = MemoryStore()
    statistics.add_activations(FINGERPRINT, {Phase.PREFILL: {0: {4: 9}}})
    warm_up(small, statistics, FINGERPRINT)
    assert _resident(small) == {(0, 4)}


def test_through_host_memory_the_best_are_in_both(file: ExpertFile, statistics: StateStore) -> None:
    slot_bytes = open_store(file, slots=1).slot_bytes
    store = open_store(file, slots=2, ram_bytes=5 * slot_bytes)
    warm_up(store, statistics, FINGERPRINT)
    assert _resident(store) == set(MOST_USED[:2])
    in_ram = {(layer, int(expert)) for layer in (0, 1) for expert in store.in_ram(layer).nonzero()[0]}
    assert in_ram >= set(MOST_USED[:2])
    store.close()


@pytest.mark.parametrize("statistics", [StoreAway(), MemoryStore()], ids=["away", "empty"])
def test_without_statistics_the_start_is_cold_and_quick(small: ExpertStore, statistics: StateStore) -> None:
    assert warm_up(small, statistics, FINGERPRINT) == 0


def test_a_slow_disk_does_not_hold_up_the_start(file: ExpertFile, statistics: StateStore) -> None:
    links: list[HeldLink] = []

    def hold(link: MemoryLink) -> MemoryLink:
        links.append(HeldLink(link))
        return links[-1]

    store = open_store(file, slots=3, wrap=hold)
    links[0].gate.clear()
    began_s = time.monotonic()
    assert warm_up(store, statistics, FINGERPRINT, timeout_s=0.05) == 0
    assert time.monotonic() - began_s < 5
    links[0].gate.set()
    assert [expert for group in store.acquire(0, [2]) for expert, _ in group] == [2]
    store.close()
