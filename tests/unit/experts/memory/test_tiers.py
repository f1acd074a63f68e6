"""Tiers and transfers: every way up, demand before prefetch within a chunk, budgets that change, contained errors."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pytest
import torch
from expert_builders import ExpertFile, HeldLink, open_store, write_experts

from actors.experts.memory.arena import RamArena
from actors.experts.memory.emulated import RamLink
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore
from cluster.errors import ConfigError, ExpertReadError
from cluster.types import ExpertId, Tier

NUM_EXPERTS, LAYERS = 6, 2
SIZE = NUM_EXPERTS * LAYERS


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), layers=LAYERS, num_experts=NUM_EXPERTS)


@pytest.fixture
def opened(experts: ExpertFile) -> Iterator[Callable[..., ExpertStore]]:
    stores: list[ExpertStore] = []

    def make(**kwargs: Any) -> ExpertStore:
        stores.append(open_store(experts, **kwargs))
        return stores[-1]

    yield make
    for store in stores:
        store.close()


class Recorded:
    """Links made by a store, in the order of making, each behind a HeldLink."""

    def __init__(self) -> None:
        self.made: list[HeldLink] = []

    def wrap(self, link: MemoryLink) -> MemoryLink:
        self.made.append(HeldLink(link))
        return self.made[-1]

    def ram_link(self, source: RamArena, target: RamArena, slot_of: Callable[[int], int | None]) -> MemoryLink:
        return self.wrap(RamLink(source, target, slot_of))


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


def _wanted(store: ExpertStore, file: ExpertFile, layer: int, experts: Sequence[int]) -> list[list[int]]:
    groups: list[list[int]] = []
    for group in store.acquire(layer, experts):
        groups.append([expert for expert, _ in group])
        for expert, weights in group:
            truth = file.experts[ExpertId(layer, expert)].weights()
            assert torch.equal(weights.down.data, truth.down.data), f"expert {expert} of layer {layer}"
    assert sorted(expert for group in groups for expert in group) == sorted(experts)
    return groups


def _priority(**by_index: float) -> np.ndarray:
    priority = np.zeros(SIZE, dtype=np.float32)
    for index, value in by_index.items():
        priority[int(index.removeprefix("e"))] = value
    return priority


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

    _wanted(store, experts, 0, [3])
    assert store.wait_idle(10)
    read = store.bytes_read

    assert _misses(store) == {Tier.DISK: 1}
    assert store.ram_resident == SIZE, "free memory is filled with what is worth most"
    for layer in (0, 1, 0):
        _wanted(store, experts, layer, range(NUM_EXPERTS))
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
            _wanted(small, experts, layer, range(NUM_EXPERTS))
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
    _wanted(store, experts, 0, [0, 4])
    assert _misses(store) == {Tier.REMOTE: 1, Tier.DISK: 1}

    shelves[0].is_lost = True  # nobody knows yet
    _wanted(store, experts, 0, [1, 2])

    assert store.source_tiers == (Tier.REMOTE, Tier.DISK)
    assert _misses(store)[Tier.REMOTE] == 3, "it was asked first"


def _into(link: MemoryLink, arena: RamArena) -> MemoryLink:
    from actors.experts.memory.disk import DiskLink

    assert isinstance(link, DiskLink)
    return DiskLink(link._reader, link._form, arena)


def test_a_demand_waits_for_one_chunk_of_a_prefetch_at_most(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=3, wrap=lambda link: InChunks(links.wrap(link)), io_threads=1)
    (disk,) = links.made
    disk.gate.clear()
    store.want(_priority(e8=1.0))
    _until(lambda: disk.loads == [8])

    threading.Timer(0.05, disk.gate.set).start()
    _wanted(store, experts, 0, [2])

    assert disk.order[:2] == [(8, 0), (2, 0)], "the chunk under way ends, then the demand goes first"
    assert store.wait_idle(10)
    assert store.resident(1)[2], "what is still wanted goes on where it stopped"
    assert sorted(disk.order) == [(2, 0), (2, 1), (2, 2), (8, 0), (8, 1), (8, 2)], "no chunk is moved twice"


def test_prefetches_no_longer_wanted_are_dropped(experts: ExpertFile, opened: Callable[..., ExpertStore]) -> None:
    links = Recorded()
    store = opened(slots=3, wrap=lambda link: InChunks(links.wrap(link)), io_threads=1)
    (disk,) = links.made
    disk.gate.clear()
    store.want(_priority(e8=1.0, e9=0.5))
    _until(lambda: disk.loads == [8])

    store.want(_priority(e10=1.0))
    disk.gate.set()
    assert store.wait_idle(10)

    assert np.flatnonzero(store.resident(1)).tolist() == [4]
    assert store.counters.prefetch_dropped.sum() == 1
    assert len(store._device.residents._free) == 2


def test_prefetches_come_in_the_order_of_priority_and_replace_only_what_is_wanted_less(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=3, wrap=links.wrap, io_threads=1)
    _wanted(store, experts, 0, [0, 1, 2])
    (disk,) = links.made
    disk.loads.clear()

    store.want(_priority(e0=0.9, e6=0.5, e7=0.8, e8=0.1, e9=-1.0))
    assert store.wait_idle(10)

    assert disk.loads == [7, 6]
    assert np.flatnonzero(store.resident(0)).tolist() == [0]
    assert np.flatnonzero(store.resident(1)).tolist() == [0, 1]
    _wanted(store, experts, 1, [0])
    store.want(None)
    _wanted(store, experts, 0, [3, 4])
    assert (store.counters.prefetch_used.sum(), store.counters.prefetch_wasted.sum()) == (1, 1)


def test_a_demand_finds_a_slot_when_prefetches_took_them_all(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=2, wrap=lambda link: InChunks(links.wrap(link)), io_threads=2)
    (disk,) = links.made
    disk.gate.clear()
    store.want(_priority(e6=1.0, e7=0.9))
    _until(lambda: (7, 0) in disk.order)
    assert store._device.residents.num_free == 0

    threading.Timer(0.05, disk.gate.set).start()

    _wanted(store, experts, 0, [0, 1, 2])


def test_what_is_computed_is_never_evicted_by_a_prefetch(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    store = opened(slots=2)
    _wanted(store, experts, 0, [0, 1])
    groups = store.acquire(0, [0, 1])
    held = next(groups)
    store.want(_priority(e6=1.0, e7=0.9))
    assert store.wait_idle(10)

    assert np.flatnonzero(store.resident(0)).tolist() == [0, 1]
    for expert, weights in held:
        assert torch.equal(weights.down.data, experts.experts[ExpertId(0, expert)].weights().down.data)
    groups.close()
    store.want(_priority(e6=1.0, e7=0.9))
    assert store.wait_idle(10)
    assert np.flatnonzero(store.resident(1)).tolist() == [0, 1]


@pytest.mark.parametrize("in_use", [False, True])
def test_a_lower_budget_evicts_down_and_a_higher_one_fills_again(
    experts: ExpertFile, opened: Callable[..., ExpertStore], in_use: bool
) -> None:
    store = opened(slots=6)
    _wanted(store, experts, 0, range(NUM_EXPERTS))

    if in_use:
        groups = store.acquire(0, range(NUM_EXPERTS))
        next(groups)
        store.set_budget(2 * store.slot_bytes)
        assert store.num_resident == NUM_EXPERTS, "all are in use"
        groups.close()
    else:
        store.set_budget(2 * store.slot_bytes)

    assert (store.num_slots, store.num_resident) == (2, 2)
    _wanted(store, experts, 1, range(NUM_EXPERTS))
    assert store.num_resident == 2
    store.set_budget(8 * store.slot_bytes)
    _wanted(store, experts, 1, range(NUM_EXPERTS))
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
        _wanted(store, experts, 1, [4])
    assert caught.value.expert == (1, 4)

    disk.gate.set()
    assert store.wait_idle(10)
    assert _wanted(store, experts, 1, [4, 5])


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
        _wanted(store, experts, 1, [3, 4, 5])
    threading.Timer(0.02, disk.gate.set).start()

    assert _wanted(store, experts, 0, [0])
    assert disk.loads == [9, 0], "only what was in a thread already"


def test_a_prefetch_that_fails_disturbs_nobody(experts: ExpertFile, opened: Callable[..., ExpertStore]) -> None:
    links = Recorded()
    store = opened(slots=2, wrap=links.wrap)
    (disk,) = links.made
    disk.broken.add(6)
    store.want(_priority(e6=1.0))
    _until(lambda: 6 in disk.loads)
    store.want(None)
    assert store.wait_idle(10)
    assert store._device.residents.num_free == 2

    assert _wanted(store, experts, 0, [0, 1])


def test_the_declared_rate_is_kept(experts: ExpertFile, opened: Callable[..., ExpertStore]) -> None:
    clock = time.perf_counter
    probe = opened(slots=1)
    rate = probe.slot_bytes / 5e-3  # 5 ms an expert
    store = opened(slots=1, ram_bytes=10**9, ram_gb_per_s=rate / 1e9)
    assert store.wait_idle(10)

    began = clock()
    for expert in range(NUM_EXPERTS):
        _wanted(store, experts, 0, [expert])
    took = clock() - began

    assert took >= NUM_EXPERTS * 5e-3
    assert store.link_is_emulated


class InChunks:
    """Splits what a link moves at once into three parts, of which the last one moves it; notes the order."""

    def __init__(self, link: MemoryLink) -> None:
        assert isinstance(link, HeldLink)
        self.link, self.tier = link, link.tier
        self.link.order = []

    def has(self, index: int) -> bool:
        return self.link.has(index)

    def num_chunks(self, index: int) -> int:
        return 3

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        self.link.order.append((index, chunk))
        if chunk == 0:
            return self.link.copy_chunk(index, 0, slot)
        return 0

    def close(self) -> None:
        self.link.close()


def _until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end
        time.sleep(1e-3)


def test_order_of_execution_is_cached_in_flight_not_started(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=5, wrap=lambda link: InChunks(links.wrap(link)), io_threads=1)
    (disk,) = links.made
    _wanted(store, experts, 0, [5])
    disk.gate.clear()
    store.want(_priority(e4=1.0))
    _until(lambda: (4, 0) in disk.order)
    threading.Timer(0.05, disk.gate.set).start()

    groups = _wanted(store, experts, 0, [0, 4, 5])

    assert groups[0] == [5]
    assert [index for index, _ in disk.order[3:]] == [4, 4, 4, 0, 0, 0], "what was on its way goes on first"
    assert store.counters.late.tolist() == [1, 0]


def test_the_link_is_used_ahead_while_loaded_experts_are_computed(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    """A forecast that came while the step waited is not forgotten when the wait is over."""
    links = Recorded()
    store = opened(slots=4, wrap=links.wrap, io_threads=1)
    (disk,) = links.made
    groups = store.acquire(0, [0, 1])
    disk.gate.clear()
    threading.Timer(0.05, disk.gate.set).start()
    store.want(_priority(e7=1.0))
    next(groups)

    assert store.wait_idle(10), "nobody asks again while the layer is computed"

    assert store.resident(1)[1]
    list(groups)


def test_a_load_ahead_goes_up_one_tier_at_a_time_and_never_costs_a_slot(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    slot_bytes = opened(slots=1).slot_bytes
    store = opened(slots=2, ram_bytes=3 * slot_bytes, ram_link=RamLink)
    assert store.wait_idle(10)
    absent = next(index for index in range(SIZE) if not store._ram.residents.resident[index])  # type: ignore[union-attr]
    expert = store.form.expert(absent)

    assert not store.load_ahead(expert, replaces=lambda _: False), "RAM is full of what is worth more"
    assert store.load_ahead(expert, replaces=lambda _: True)
    assert store.wait_idle(10)
    assert store.in_ram(expert.layer)[expert.expert] and not store.resident(expert.layer)[expert.expert]
    assert store.load_ahead(expert, replaces=lambda _: True)
    assert store.wait_idle(10)
    assert store.resident(expert.layer)[expert.expert]
    for index in range(3 * SIZE):  # far more than there are slots
        store.load_ahead(store.form.expert(index % SIZE), replaces=lambda _: True)
    for layer in range(LAYERS):
        _wanted(store, experts, layer, range(NUM_EXPERTS))
    assert store.num_resident == 2
