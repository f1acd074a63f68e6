"""Loading ahead never costs a wanted expert its room or its contents; the worker's memory keeps what is used most."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from expert_builders import HIDDEN, ExpertFile, HeldLink, dense_form, dense_moe, open_store, write_experts
from hypothesis import given, settings

from actors.expert_client.local_memory import LocalMemory
from actors.experts.backend import ExpertBackend
from actors.experts.compute import ExpertCompute
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore
from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork
from cluster.errors import ExpertReadError
from cluster.policies.residency import LOADING
from cluster.types import ExpertId

NUM_EXPERTS, LAYERS = 6, (0, 1)


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), num_experts=NUM_EXPERTS)


@pytest.fixture
def make_store(experts: ExpertFile) -> Iterator[Callable[[int], ExpertStore]]:
    made: list[ExpertStore] = []

    def make(slots: int) -> ExpertStore:
        made.append(open_store(experts, slots=slots))
        return made[-1]

    yield make
    for store in made:
        store.close()


def _held_store(file: ExpertFile, slots: int) -> tuple[ExpertStore, HeldLink]:
    made: list[HeldLink] = []

    def wrap(link: MemoryLink) -> MemoryLink:
        made.append(HeldLink(link))
        return made[0]

    return open_store(file, slots=slots, wrap=wrap), made[0]


def _index(expert: ExpertId) -> int:
    return expert.layer * NUM_EXPERTS + expert.expert


def _release_later(link: HeldLink) -> None:
    """While the test's thread waits for the load."""
    threading.Timer(0.05, link.gate.set).start()


def _check(store: ExpertStore) -> None:
    """Every slot is free, away, or one expert's; every resident expert has one; nothing is held."""
    assert store.wait_idle(10)
    residents = store._device.residents
    taken = [slot for slot in residents.slots if slot >= 0]
    assert sorted([*residents._free, *residents._retired, *taken]) == list(range(store.grid.size))
    assert len(residents._free) + len(taken) == store.num_slots
    assert [slot >= 0 for slot in residents.slots] == residents.resident.tolist()
    assert not residents.holds.any()
    assert not (residents.state == LOADING).any()


def _wanted(store: ExpertStore, file: ExpertFile, layer: int, experts: list[int]) -> list[int]:
    got: list[int] = []
    for group in store.acquire(layer, experts):
        for expert, weights in group:
            truth = file.experts[ExpertId(layer, expert)].weights()
            assert torch.equal(weights.down.data, truth.down.data), f"expert {expert} of layer {layer}"
            got.append(expert)
    return got


@settings(max_examples=40, deadline=None)
@given(
    slots=st.integers(1, 8),
    steps=st.lists(
        st.tuples(
            st.sampled_from(["want", "ahead", "take", "break", "mend"]),
            st.sampled_from(LAYERS),
            st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True, min_size=1, max_size=4),
            st.booleans(),
        ),
        max_size=25,
    ),
)
def test_any_order_of_wanting_and_loading_ahead_keeps_every_slot_accounted_for(
    experts: ExpertFile, slots: int, steps: list[tuple[str, int, list[int], bool]]
) -> None:
    store, reads = _held_store(experts, slots)
    for action, layer, chosen, flag in steps:
        expert = ExpertId(layer, chosen[0])
        if action == "break":
            reads.broken.add(_index(expert))
        elif action == "mend":
            reads.broken.clear()
        elif action == "ahead":
            known = store.resident(layer)[chosen[0]]
            began = store.prefetch(expert, replaces=lambda _victim, answer=flag: answer)
            assert not (began and known)
        elif action == "take":
            assert store.wait_idle(10)
        elif {_index(ExpertId(layer, e)) for e in chosen if not store.resident(layer)[e]} & reads.broken:
            with pytest.raises(ExpertReadError):
                _wanted(store, experts, layer, chosen)
        else:
            assert sorted(_wanted(store, experts, layer, chosen)) == sorted(chosen)
        _check(store)
    reads.broken.clear()
    assert sorted(_wanted(store, experts, 0, list(range(NUM_EXPERTS)))) == list(range(NUM_EXPERTS))
    _check(store)
    store.close()


def test_expert_that_is_on_its_way_is_waited_for_and_read_once(
    experts: ExpertFile,
) -> None:
    store, reads = _held_store(experts, 4)
    reads.gate.clear()
    assert store.prefetch(ExpertId(0, 3), replaces=lambda _: False)
    assert not store.resident(0).any(), "taken in only when it is there"
    _release_later(reads)

    assert sorted(_wanted(store, experts, 0, [1, 3])) == [1, 3]

    assert reads.loads.count(_index(ExpertId(0, 3))) == 1
    assert store.counters.late.tolist() == [1, 0]
    _check(store)
    store.close()


@pytest.mark.parametrize("breaks", [False, True])
def test_wanted_expert_gets_the_last_slot_from_one_loaded_ahead(experts: ExpertFile, breaks: bool) -> None:
    store, reads = _held_store(experts, 1)
    reads.gate.clear()
    assert store.prefetch(ExpertId(1, 0), replaces=lambda _: False)
    if breaks:
        reads.broken.add(_index(ExpertId(1, 0)))
    _release_later(reads)

    assert _wanted(store, experts, 0, [5]) == [5]
    _check(store)
    store.close()


def test_prefetch_that_failed_is_forgotten_and_tried_again_on_demand(
    experts: ExpertFile,
) -> None:
    store, reads = _held_store(experts, 3)
    reads.broken.add(_index(ExpertId(0, 2)))
    assert store.prefetch(ExpertId(0, 2), replaces=lambda _: False)
    _check(store)
    assert not store.resident(0).any()

    with pytest.raises(ExpertReadError):
        _wanted(store, experts, 0, [2])
    reads.broken.clear()
    assert _wanted(store, experts, 0, [2]) == [2]
    store.close()


def test_only_one_at_a_time_and_only_for_something_worth_less(
    experts: ExpertFile, make_store: Callable[[int], ExpertStore]
) -> None:
    store = make_store(2)
    asked: list[ExpertId] = []
    for expert in (0, 1):
        _wanted(store, experts, 0, [expert])

    def refuses(victim: ExpertId) -> bool:
        asked.append(victim)
        return False

    assert not store.prefetch(ExpertId(0, 1), replaces=lambda _: True), "it is here"
    assert not store.prefetch(ExpertId(0, 2), replaces=refuses)
    assert asked == [ExpertId(0, 0)], "the policy's victim"
    assert store.resident(0).tolist() == [True, True, False, False, False, False]
    assert store.prefetch(ExpertId(0, 2), replaces=lambda _: True)
    assert not store.prefetch(ExpertId(0, 3), replaces=lambda _: True), "one is on its way"
    assert store.wait_idle(10)
    assert store.resident(0).tolist() == [False, True, True, False, False, False]


def test_close_waits_for_a_prefetch(experts: ExpertFile) -> None:
    store, reads = _held_store(experts, 2)
    reads.gate.clear()
    store.prefetch(ExpertId(0, 0), replaces=lambda _: False)
    deadline_s = time.monotonic() + 10
    while not reads.loads and time.monotonic() < deadline_s:
        time.sleep(0.001)
    _release_later(reads)

    store.close()

    assert reads.gate.is_set()


class Memory:
    """A LocalMemory of `slots` experts, 0 for none, and what it counted."""

    def __init__(self, file: ExpertFile, slots: int) -> None:
        compute = ExpertCompute(None, dense_form(torch.float32), compute_dtype=torch.float32)
        self.recorder = ActivationRecorder(LAYERS, NUM_EXPERTS, None)
        self.store = open_store(file, slots=slots) if slots else None
        self.fallbacks: list[ExpertStore] = []

        def fallback() -> ExpertBackend:
            self.fallbacks.append(open_store(file, slots=2))
            return ExpertBackend(self.fallbacks[-1], compute)

        backend = ExpertBackend(self.store, compute) if self.store else None
        self.local = LocalMemory(backend, fallback, self.recorder)

    def use(self, layer: int, expert: int, times: int) -> None:
        ids = torch.full((times, 1), expert)
        self.recorder.record(ExpertWork(layer, torch.empty(times, 1), ids, torch.ones(times, 1)), times, times)
        self.recorder.settle()


@pytest.fixture
def make_memory(experts: ExpertFile) -> Iterator[Callable[[int], Memory]]:
    made: list[Memory] = []

    def make(slots: int) -> Memory:
        made.append(Memory(experts, slots))
        return made[-1]

    yield make
    for memory in made:
        memory.local.close()


def _row(experts: ExpertFile, memory: Memory, layer: int, ids: list[int]) -> None:
    x = torch.randn(1, HIDDEN, generator=torch.Generator().manual_seed(0))
    ids_TK, weights = torch.tensor([ids]), torch.full((1, len(ids)), 0.5)
    out = memory.local.partial_sums(layer, x, ids_TK, weights)
    torch.testing.assert_close(
        out.double(), dense_moe(experts.experts, layer, x, ids_TK, weights), rtol=1e-4, atol=1e-5
    )


def test_without_room_any_expert_is_still_computed_and_the_room_is_given_back(
    experts: ExpertFile, make_memory: Callable[[int], Memory]
) -> None:
    memory = make_memory(0)
    assert memory.local.resident(0) is None
    memory.local.admit(0, np.array([1]))  # nothing to admit to
    for layer in LAYERS:
        _row(experts, memory, layer, [4, 1])
    assert len(memory.fallbacks) == 1
    assert memory.local.fallback is not None

    memory.local.release_fallback()
    memory.local.release_fallback()

    assert memory.local.fallback is None
    assert memory.fallbacks[0].num_resident == 0
    _row(experts, memory, 0, [2, 3])
    assert len(memory.fallbacks) == 2


def test_with_room_no_fallback_is_made(experts: ExpertFile, make_memory: Callable[[int], Memory]) -> None:
    memory = make_memory(2)

    _row(experts, memory, 1, [5, 0])

    assert memory.fallbacks == []


def test_free_room_takes_the_most_used_of_what_went_away(make_memory: Callable[[int], Memory]) -> None:
    memory = make_memory(2)
    assert memory.store is not None
    for expert, times in ((1, 3), (2, 9), (3, 5)):
        memory.use(0, expert, times)

    memory.local.admit(0, np.array([1, 2, 3]))
    assert memory.store.wait_idle(10)

    here = memory.local.resident(0)
    assert here is not None
    assert np.flatnonzero(here).tolist() == [2]
    memory.local.admit(0, np.array([], np.int64))


def test_expert_is_replaced_only_by_one_used_clearly_more(
    experts: ExpertFile, make_memory: Callable[[int], Memory]
) -> None:
    memory = make_memory(1)
    assert memory.store is not None
    memory.use(0, 0, 100)
    _wanted(memory.store, experts, 0, [0])

    def admit(expert: int) -> list[int]:
        assert memory.store is not None
        memory.local.admit(1, np.array([expert]))
        assert memory.store.wait_idle(10)
        return np.flatnonzero(memory.store.resident(1)).tolist()

    memory.use(1, 4, 100)
    assert admit(4) == [], "as much: loads are not free"
    memory.use(1, 4, 20)
    assert admit(4) == [], "a little more"
    memory.use(1, 4, 100)
    assert admit(4) == [4]
    assert admit(3) == [4], "never used"
