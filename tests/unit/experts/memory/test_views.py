"""Views of experts in their slots: those of the bytes that are there, a little for each slot, and counted."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expert_builders import ExpertFile, open_store, write_experts

from actors.experts.memory.arena import RamArena
from actors.experts.memory.store import ExpertStore
from actors.experts.memory.views import SLOT_BYTES, ExpertViews, view_bytes_for

LAYERS, NUM_EXPERTS, SLOTS = 4, 24, 5


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    """Sizes that are no multiples of a page: each expert's parts lie elsewhere within theirs."""
    return write_experts(
        tmp_path_factory.mktemp("experts"), layers=LAYERS, num_experts=NUM_EXPERTS, hidden=12, intermediate=10
    )


def _use_all(store: ExpertStore, rounds: int = 3) -> int:
    """Ask for every expert, in changing company; how many views that would be if all were kept."""
    random, pairs = np.random.default_rng(0), set[tuple[int, int]]()
    for _ in range(rounds * LAYERS * NUM_EXPERTS // 3):
        layer, wanted = int(random.integers(LAYERS)), sorted(random.choice(NUM_EXPERTS, 3, replace=False).tolist())
        for group in store.acquire(layer, wanted):
            for expert, weights in group:
                pairs.add((layer * NUM_EXPERTS + expert, weights.pointers.down))
    return len(pairs)


def test_views_do_not_grow_with_what_passes_through(experts: ExpertFile) -> None:
    store = open_store(experts, slots=SLOTS)
    num_pairs = _use_all(store, 20)
    num_patterns = len({store.form.part_offsets[index] for index in range(store.grid.size)})
    assert num_pairs > 10 * SLOTS and num_patterns > SLOTS, "they would"

    after, more = store.view_bytes, _use_all(store, 10) and store.view_bytes

    assert 0 < after <= view_bytes_for(SLOTS) + view_bytes_for(num_patterns)
    assert more == after
    store.close()


def test_a_smaller_budget_gives_views_back(experts: ExpertFile) -> None:
    store = open_store(experts, slots=40)
    _use_all(store, 20)
    before = store.view_bytes

    store.set_budget(SLOTS * store.slot_bytes)
    _use_all(store)

    assert store.view_bytes <= before - 35 * SLOT_BYTES
    store.close()


def test_a_view_is_of_the_bytes_in_its_slot_whoever_was_there_before(experts: ExpertFile) -> None:
    store = open_store(experts, slots=SLOTS)
    form, arena = store.form, RamArena(SLOTS, store.slot_bytes)
    views, random = ExpertViews(form, arena), np.random.default_rng(1)
    for _ in range(200):
        index, slot = int(random.integers(store.grid.size)), int(random.integers(SLOTS))

        got, wanted = views.weights(index, slot), form.weights(index, slot, arena.buffer)

        assert bytes(got.pointers) == bytes(wanted.pointers)
        assert got.intermediate == wanted.intermediate
        for mine, theirs in ((got.gate, wanted.gate), (got.up, wanted.up), (got.down, wanted.down)):
            assert mine is not None and theirs is not None
            assert mine.data.data_ptr() == theirs.data.data_ptr() and mine.data.shape == theirs.data.shape
    store.close()


def test_tensors_are_made_for_who_asks_only(experts: ExpertFile) -> None:
    store = open_store(experts, slots=SLOTS)
    _use_all(store)
    before = store.view_bytes
    ((_, weights),) = next(store.acquire(0, [3]))

    assert not weights.has_tensors
    assert torch.isfinite(weights.gate.data.float()).all()
    assert weights.has_tensors
    assert store.view_bytes > before
    store.close()
