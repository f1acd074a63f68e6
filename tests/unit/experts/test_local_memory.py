"""Loading ahead never costs a wanted expert its room or its contents; the worker's memory keeps what is used most."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from expert_builders import HIDDEN, ExpertFile, dense_form, dense_moe, open_store, write_experts
from hypothesis import given, settings

from actors.experts.backend import ExpertBackend
from actors.experts.compute import ExpertCompute
from actors.experts.local_memory import LocalMemory
from actors.experts.recorder import ActivationRecorder
from actors.experts.store import ExpertStore
from cluster.errors import ExpertReadError
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


class HeldReads:
    """Loads of `store` wait until `release`, and fail for the experts in `broken`."""

    def __init__(self, store: ExpertStore) -> None:
        self.broken: set[ExpertId] = set()
        self.gate = threading.Event()
        self.gate.set()
        self.loads: list[ExpertId] = []
        load = store._load

        def held(expert: ExpertId, slot: int) -> None:
            self.loads.append(expert)
            assert self.gate.wait(10)
            if expert in self.broken:
                raise ExpertReadError(f"expert {expert} is broken")
            load(expert, slot)

        store._load = held  # type: ignore[method-assign]

    def release_later(self) -> None:
        """While the test's thread waits for the load."""
        threading.Timer(0.05, self.gate.set).start()


def _check(store: ExpertStore) -> None:
    """Every slot is free, or one expert's; every resident expert is where it says."""
    ahead = [slot for _, slot in store._ahead.values()]
    assert sorted([*store._free, *store._slots.values(), *ahead]) == list(range(store.num_slots))
    assert set(store._slots) == set(store._weights)
    assert not set(store._slots) & set(store._ahead), "two slots for one expert"
    assert store._pinned == set()
    for layer in LAYERS:
        resident = {expert for expert in range(NUM_EXPERTS) if store.resident(layer)[expert]}
        assert resident == {expert.expert for expert in store._slots if expert.layer == layer}


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
    store = open_store(experts, slots=slots)
    reads = HeldReads(store)
    for action, layer, chosen, flag in steps:
        expert = ExpertId(layer, chosen[0])
        if action == "break":
            reads.broken.add(expert)
        elif action == "mend":
            reads.broken.clear()
        elif action == "ahead":
            known = expert in store._weights or bool(store._ahead)
            began = store.load_ahead(expert, replaces=lambda _victim, answer=flag: answer)
            assert not (began and known)
        elif action == "take":
            store.take_in_ahead(wait_for_it=flag)
        elif {ExpertId(layer, e) for e in chosen if ExpertId(layer, e) not in store._weights} & reads.broken:
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
    experts: ExpertFile, make_store: Callable[[int], ExpertStore]
) -> None:
    store = make_store(4)
    reads = HeldReads(store)
    reads.gate.clear()
    assert store.load_ahead(ExpertId(0, 3), replaces=lambda _: False)
    store.take_in_ahead()
    assert not store.resident(0).any(), "taken in only when it is there"
    reads.release_later()

    assert sorted(_wanted(store, experts, 0, [1, 3])) == [1, 3]

    assert reads.loads.count(ExpertId(0, 3)) == 1
    _check(store)


@pytest.mark.parametrize("breaks", [False, True])
def test_wanted_expert_gets_the_last_slot_from_one_loaded_ahead(
    experts: ExpertFile, make_store: Callable[[int], ExpertStore], breaks: bool
) -> None:
    store = make_store(1)
    reads = HeldReads(store)
    reads.gate.clear()
    assert store.load_ahead(ExpertId(1, 0), replaces=lambda _: False)
    if breaks:
        reads.broken.add(ExpertId(1, 0))
    reads.release_later()

    assert _wanted(store, experts, 0, [5]) == [5]
    _check(store)


def test_load_ahead_that_failed_is_forgotten_and_tried_again_on_demand(
    experts: ExpertFile, make_store: Callable[[int], ExpertStore]
) -> None:
    store = make_store(3)
    reads = HeldReads(store)
    reads.broken.add(ExpertId(0, 2))
    assert store.load_ahead(ExpertId(0, 2), replaces=lambda _: False)
    store.take_in_ahead(wait_for_it=True)
    assert not store.resident(0).any()
    _check(store)

    with pytest.raises(ExpertReadError):
        _wanted(store, experts, 0, [2])
    reads.broken.clear()
    assert _wanted(store, experts, 0, [2]) == [2]


def test_only_one_at_a_time_and_only_for_something_worth_less(
    experts: ExpertFile, make_store: Callable[[int], ExpertStore]
) -> None:
    store = make_store(2)
    asked: list[ExpertId] = []
    _wanted(store, experts, 0, [0, 1])

    def refuses(victim: ExpertId) -> bool:
        asked.append(victim)
        return False

    assert not store.load_ahead(ExpertId(0, 1), replaces=lambda _: True), "it is here"
    assert not store.load_ahead(ExpertId(0, 2), replaces=refuses)
    assert asked == [ExpertId(0, 0)], "the policy's victim"
    assert store.resident(0).tolist() == [True, True, False, False, False, False]
    assert store.load_ahead(ExpertId(0, 2), replaces=lambda _: True)
    assert not store.load_ahead(ExpertId(0, 3), replaces=lambda _: True), "one is on its way"
    store.take_in_ahead(wait_for_it=True)
    assert store.resident(0).tolist() == [False, True, True, False, False, False]


def test_close_waits_for_a_load_ahead(experts: ExpertFile) -> None:
    store = open_store(experts, slots=2)
    reads = HeldReads(store)
    reads.gate.clear()
    store.load_ahead(ExpertId(0, 0), replaces=lambda _: False)
    reads.release_later()

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
        self.recorder.record(layer, torch.full((times, 1), expert), times)


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
    memory.store.take_in_ahead(wait_for_it=True)

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
        memory.store.take_in_ahead(wait_for_it=True)
        return np.flatnonzero(memory.store.resident(1)).tolist()

    memory.use(1, 4, 100)
    assert admit(4) == [], "as much: loads are not free"
    memory.use(1, 4, 20)
    assert admit(4) == [], "a little more"
    memory.use(1, 4, 100)
    assert admit(4) == [4]
    assert admit(3) == [4], "never used"
