"""Tiers: every way up, budgets that change, the order of execution, contained errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence

import pytest
from expert_builders import ExpertFile, HeldLink
from held_stores import LAYERS, NUM_EXPERTS, SIZE, Recorded, wanted_groups

from actors.experts.memory.arena import RamArena
from actors.experts.memory.emulated import RamLink
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore
from cluster.errors import ConfigError, ExpertReadError
from cluster.types import Tier


class RemoteShelf:
    """Stands in for another node's memory: has some experts, from the same file; loses them when told."""

    tier = Tier.REMOTE

    def __init__(self, link: MemoryLink, indices: Sequence[int]) -> None:
        self.link, self.indices, self.is_lost = link, set(indices), False

    def has(self, index: int) -> bool:
        return index in self.indices

    def num_chunks(self, index: int) -> int:
        return self.link.num_chunks(index)

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        if self.is_lost:
            raise ExpertReadError("node 7 is gone")
        return self.link.copy_chunk(index, chunk, slot)

    def close(self) -> None:
        """The link is closed as the store's own."""


def _misses(store: ExpertStore) -> dict[Tier, int]:
    return {tier: int(values.sum()) for tier, values in store.counters.misses.items() if values.any()}


def test_an_expert_rises_from_disk_through_host_and_stays_there(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()

    def closed(link: MemoryLink) -> MemoryLink:  # RAM has free slots: it would fill itself at once
        held = links.wrap(link)
        assert isinstance(held, HeldLink)
        held.gate.clear()
        return held

    store = opened(slots=2, wrap=closed, ram_bytes=10**9, ram_link=links.ram_link)
    disk, _ = links.made
    threading.Timer(0.05, disk.gate.set).start()

    wanted_groups(store, experts, 0, [3])
    assert store.wait_idle(10)
    read = store.bytes_read

    assert _misses(store) == {Tier.DISK: 1}
    assert store.ram_resident == SIZE, "free memory is filled with what is worth most"
    for layer in (0, 1, 0):
        wanted_groups(store, experts, layer, range(NUM_EXPERTS))
    assert _misses(store) == {Tier.DISK: 1, Tier.RAM: 3 * NUM_EXPERTS - 1}
    assert store.bytes_read == read, "nothing is read twice"
    assert store.num_resident == 2


def test_host_smaller_than_the_model_evicts_and_reads_again(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    store = opened(slots=2, ram_bytes=0)
    small = opened(slots=2, ram_bytes=4 * store.slot_bytes, ram_link=RamLink, io_threads=3)

    for _ in range(3):
        for layer in range(LAYERS):
            wanted_groups(small, experts, layer, range(NUM_EXPERTS))
    assert small.wait_idle(10)

    assert small.ram_resident == 4
    assert small.num_resident == 2
    assert sum(_misses(small).values()) >= 3 * SIZE - 2


def test_loads_give_way_on_a_link_of_one_thread_and_not_where_all_chunks_move_at_once(
    opened: Callable[..., ExpertStore],
) -> None:
    assert opened(slots=2, ram_bytes=10**9, ram_link=RamLink).loads_give_way
    assert not opened(slots=2, ram_bytes=0, io_threads=8).loads_give_way


def test_what_another_node_has_comes_from_there_and_from_disk_when_it_is_lost(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    shelves: list[RemoteShelf] = []
    plain = opened(slots=1)

    def remote(arena: RamArena) -> MemoryLink:
        source = plain._device.links[0]
        shelf = RemoteShelf(_into(source, arena), [0, 1, 2])
        shelves.append(shelf)
        return shelf

    store = opened(slots=2, first=remote)
    wanted_groups(store, experts, 0, [0, 4])
    assert _misses(store) == {Tier.REMOTE: 1, Tier.DISK: 1}

    shelves[0].is_lost = True  # nobody knows yet
    wanted_groups(store, experts, 0, [1, 2])

    assert store.source_tiers == (Tier.REMOTE, Tier.DISK)
    assert _misses(store)[Tier.REMOTE] == 3, "it was asked first"


def _into(link: MemoryLink, arena: RamArena) -> MemoryLink:
    from actors.experts.memory.disk import DiskLink

    assert isinstance(link, DiskLink)
    return DiskLink(link._reader, link._form, arena)


@pytest.mark.parametrize("in_use", [False, True])
def test_a_lower_budget_evicts_down_and_a_higher_one_fills_again(
    experts: ExpertFile, opened: Callable[..., ExpertStore], in_use: bool
) -> None:
    store = opened(slots=6)
    wanted_groups(store, experts, 0, range(NUM_EXPERTS))

    if in_use:
        groups = store.acquire(0, range(NUM_EXPERTS))
        next(groups)
        store.set_budget(2 * store.slot_bytes)
        assert store.num_resident == NUM_EXPERTS, "all are in use"
        groups.close()
    else:
        store.set_budget(2 * store.slot_bytes)

    assert (store.num_slots, store.num_resident) == (2, 2)
    wanted_groups(store, experts, 1, range(NUM_EXPERTS))
    assert store.num_resident == 2
    store.set_budget(8 * store.slot_bytes)
    wanted_groups(store, experts, 1, range(NUM_EXPERTS))
    assert store.num_resident == 6
    with pytest.raises(ConfigError, match=r"experts\.cache"):
        store.set_budget(store.slot_bytes - 1)


def test_a_load_that_takes_too_long_fails_with_the_file_and_the_store_goes_on(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=2, wrap=links.wrap, load_timeout_s=0.05)
    (disk,) = links.made
    disk.gate.clear()

    with pytest.raises(ExpertReadError, match=str(experts.file)) as caught:
        wanted_groups(store, experts, 1, [4])
    assert caught.value.expert == (1, 4)

    disk.gate.set()
    assert store.wait_idle(10)
    assert wanted_groups(store, experts, 1, [4, 5])


def test_what_a_failed_step_still_waited_for_is_not_read(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    """Nor do its errors reach the next step."""
    links = Recorded()
    store = opened(slots=4, wrap=links.wrap, load_timeout_s=0.5, io_threads=1)
    (disk,) = links.made
    disk.gate.clear()
    disk.broken |= {9, 10, 11}

    with pytest.raises(ExpertReadError, match="expert 3 of layer 1"):
        wanted_groups(store, experts, 1, [3, 4, 5])
    threading.Timer(0.02, disk.gate.set).start()

    assert wanted_groups(store, experts, 0, [0])
    assert disk.loads == [9, 0], "only what was in a thread already"


def test_the_declared_rate_is_kept(experts: ExpertFile, opened: Callable[..., ExpertStore]) -> None:
    clock = time.perf_counter
    probe = opened(slots=1)
    rate = probe.slot_bytes / 5e-3  # 5 ms an expert
    store = opened(slots=1, ram_bytes=10**9, ram_gb_per_s=rate / 1e9)
    assert store.wait_idle(10)

    began = clock()
    for expert in range(NUM_EXPERTS):
        wanted_groups(store, experts, 0, [expert])
    took = clock() - began

    assert took >= NUM_EXPERTS * 5e-3
    assert store.link_is_emulated
