"""Prefetch: it gives way to demand within a chunk, costs no slot that is worth more, and disturbs nobody."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import torch
from expert_builders import ExpertFile
from held_stores import LAYERS, NUM_EXPERTS, SIZE, InChunks, Recorded, priority_of, wait_until, wanted_groups

from actors.experts.memory.emulated import RamLink
from actors.experts.memory.store import ExpertStore
from cluster.types import ExpertId


def test_a_demand_waits_for_one_chunk_of_a_prefetch_at_most(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=3, wrap=lambda link: InChunks(links.wrap(link)), io_threads=1)
    (disk,) = links.made
    disk.gate.clear()
    store.want(priority_of(e8=1.0))
    wait_until(lambda: disk.loads == [8])

    threading.Timer(0.05, disk.gate.set).start()
    wanted_groups(store, experts, 0, [2])

    assert disk.order[:2] == [(8, 0), (2, 0)], "the chunk under way ends, then the demand goes first"
    assert store.wait_idle(10)
    assert store.resident(1)[2], "what is still wanted goes on where it stopped"
    assert sorted(disk.order) == [(2, 0), (2, 1), (2, 2), (8, 0), (8, 1), (8, 2)], "no chunk is moved twice"


def test_prefetches_no_longer_wanted_are_dropped(experts: ExpertFile, opened: Callable[..., ExpertStore]) -> None:
    links = Recorded()
    store = opened(slots=3, wrap=lambda link: InChunks(links.wrap(link)), io_threads=1)
    (disk,) = links.made
    disk.gate.clear()
    store.want(priority_of(e8=1.0, e9=0.5))
    wait_until(lambda: disk.loads == [8])

    store.want(priority_of(e10=1.0))
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
    wanted_groups(store, experts, 0, [0, 1, 2])
    (disk,) = links.made
    disk.loads.clear()

    store.want(priority_of(e0=0.9, e6=0.5, e7=0.8, e8=0.1, e9=-1.0))
    assert store.wait_idle(10)

    assert disk.loads == [7, 6]
    assert np.flatnonzero(store.resident(0)).tolist() == [0]
    assert np.flatnonzero(store.resident(1)).tolist() == [0, 1]
    wanted_groups(store, experts, 1, [0])
    store.want(None)
    wanted_groups(store, experts, 0, [3, 4])
    assert (store.counters.prefetch_used.sum(), store.counters.prefetch_wasted.sum()) == (1, 1)


def test_a_demand_finds_a_slot_when_prefetches_took_them_all(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=2, wrap=lambda link: InChunks(links.wrap(link)), io_threads=2)
    (disk,) = links.made
    disk.gate.clear()
    store.want(priority_of(e6=1.0, e7=0.9))
    wait_until(lambda: (7, 0) in disk.order)
    assert store._device.residents.num_free == 0

    threading.Timer(0.05, disk.gate.set).start()

    wanted_groups(store, experts, 0, [0, 1, 2])


def test_what_is_computed_is_never_evicted_by_a_prefetch(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    store = opened(slots=2)
    wanted_groups(store, experts, 0, [0, 1])
    groups = store.acquire(0, [0, 1])
    held = next(groups)
    store.want(priority_of(e6=1.0, e7=0.9))
    assert store.wait_idle(10)

    assert np.flatnonzero(store.resident(0)).tolist() == [0, 1]
    for expert, weights in held:
        assert torch.equal(weights.down.data, experts.experts[ExpertId(0, expert)].weights().down.data)
    groups.close()
    store.want(priority_of(e6=1.0, e7=0.9))
    assert store.wait_idle(10)
    assert np.flatnonzero(store.resident(1)).tolist() == [0, 1]


def test_a_prefetch_that_fails_disturbs_nobody(experts: ExpertFile, opened: Callable[..., ExpertStore]) -> None:
    links = Recorded()
    store = opened(slots=2, wrap=links.wrap)
    (disk,) = links.made
    disk.broken.add(6)
    store.want(priority_of(e6=1.0))
    wait_until(lambda: 6 in disk.loads)
    store.want(None)
    assert store.wait_idle(10)
    assert store._device.residents.num_free == 2

    assert wanted_groups(store, experts, 0, [0, 1])


def test_order_of_execution_is_cached_in_flight_not_started(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    links = Recorded()
    store = opened(slots=5, wrap=lambda link: InChunks(links.wrap(link)), io_threads=1)
    (disk,) = links.made
    wanted_groups(store, experts, 0, [5])
    disk.gate.clear()
    store.want(priority_of(e4=1.0))
    wait_until(lambda: (4, 0) in disk.order)
    threading.Timer(0.05, disk.gate.set).start()

    groups = wanted_groups(store, experts, 0, [0, 4, 5])

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
    store.want(priority_of(e7=1.0))
    next(groups)

    assert store.wait_idle(10), "nobody asks again while the layer is computed"

    assert store.resident(1)[1]
    list(groups)


def test_a_prefetch_goes_up_one_tier_at_a_time_and_never_costs_a_slot(
    experts: ExpertFile, opened: Callable[..., ExpertStore]
) -> None:
    slot_bytes = opened(slots=1).slot_bytes
    store = opened(slots=2, ram_bytes=3 * slot_bytes, ram_link=RamLink)
    assert store.wait_idle(10)
    absent = next(index for index in range(SIZE) if not store._ram.residents.resident[index])  # type: ignore[union-attr]
    expert = store.form.expert(absent)

    assert not store.prefetch(expert, replaces=lambda _: False), "RAM is full of what is worth more"
    assert store.prefetch(expert, replaces=lambda _: True)
    assert store.wait_idle(10)
    assert store.in_ram(expert.layer)[expert.expert] and not store.resident(expert.layer)[expert.expert]
    assert store.prefetch(expert, replaces=lambda _: True)
    assert store.wait_idle(10)
    assert store.resident(expert.layer)[expert.expert]
    for index in range(3 * SIZE):  # far more than there are slots
        store.prefetch(store.form.expert(index % SIZE), replaces=lambda _: True)
    for layer in range(LAYERS):
        wanted_groups(store, experts, layer, range(NUM_EXPERTS))
    assert store.num_resident == 2
