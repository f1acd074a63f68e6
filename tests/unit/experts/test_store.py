"""The expert memory: right contents within the budget, each wanted expert once, and errors that break nothing."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path

import hypothesis.strategies as st
import pytest
import torch
from expert_builders import ExpertFile, Matrices, open_store, write_experts
from hypothesis import HealthCheck, given, settings
from torch import Tensor

from actors.experts.memory.report import layers_report
from actors.experts.memory.store import ExpertStore
from actors.weights.formats.expert import ExpertWeights
from actors.weights.slots import held_expert_bytes
from cluster.errors import ConfigError, ExpertReadError
from cluster.types import ExpertId, Phase

NUM_EXPERTS = 6


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), num_experts=NUM_EXPERTS, shift=5)


@pytest.fixture(scope="module")
def aligned(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("aligned"), num_experts=NUM_EXPERTS, adjacent=False)


def _is(weights: ExpertWeights, truth: Matrices) -> bool:
    return all(
        torch.equal(got, want.to(got.dtype))
        for got, want in zip(_parts(weights), (truth.gate, truth.up, truth.down), strict=True)
    )


def _parts(weights: ExpertWeights) -> tuple[Tensor, Tensor, Tensor]:
    assert weights.up is not None
    return weights.gate.data, weights.up.data, weights.down.data


def _span(weights: ExpertWeights) -> tuple[int, int]:
    parts = _parts(weights)
    return min(p.data_ptr() for p in parts), max(p.data_ptr() + p.numel() * p.element_size() for p in parts)


def _acquire(store: ExpertStore, file: ExpertFile, layer: int, wanted: Sequence[int]) -> list[list[int]]:
    """Acquire and check everything that must hold of every group."""
    groups: list[list[int]] = []
    for group in store.acquire(layer, wanted):
        groups.append([expert for expert, _ in group])
        spans = sorted(_span(weights) for _, weights in group)
        assert all(stop <= start for (_, stop), (start, _) in pairwise(spans)), "slots are shared"
        for expert, weights in group:
            assert _is(weights, file.experts[ExpertId(layer, expert)]), f"expert {expert} of layer {layer}"
            assert weights.pointers.down == weights.down.data.data_ptr()
        assert store.num_resident * store.slot_bytes <= store.budget_bytes
    assert sorted(expert for group in groups for expert in group) == sorted(wanted), "each wanted expert, once"
    return groups


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    slots=st.integers(1, 2 * NUM_EXPERTS),
    asks=st.lists(
        st.tuples(st.integers(0, 1), st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True), st.booleans()), max_size=12
    ),
    held=st.sampled_from([torch.float32, torch.bfloat16]),
)
def test_any_sequence_of_asks_is_answered_right_within_the_budget(
    experts: ExpertFile, slots: int, asks: list[tuple[int, list[int], bool]], held: torch.dtype
) -> None:
    store = open_store(experts, slots=slots, held_dtype=held)
    assert store.num_slots == slots
    for layer, wanted, leaves_early in asks:
        if leaves_early:
            groups = store.acquire(layer, wanted)
            next(groups, None)
            groups.close()
        else:
            _acquire(store, experts, layer, wanted)
        assert store.num_resident <= slots
    everything = list(range(NUM_EXPERTS))
    _acquire(store, experts, 0, everything)
    assert store.num_resident == slots or slots > NUM_EXPERTS
    store.close()


def test_resident_experts_come_first_in_one_group(experts: ExpertFile) -> None:
    store = open_store(experts, slots=8)
    _acquire(store, experts, 0, [1, 3])

    groups = _acquire(store, experts, 0, [0, 1, 2, 3])

    assert groups[0] == [1, 3]
    assert (store.counters.num_hits, store.counters.num_misses) == (2, 4)
    assert _acquire(store, experts, 0, [0, 1, 2, 3]) == [[0, 1, 2, 3]]
    store.close()


def test_more_wanted_than_slots_works_in_waves(experts: ExpertFile) -> None:
    store = open_store(experts, slots=2)

    groups = _acquire(store, experts, 1, range(NUM_EXPERTS))

    assert all(len(group) <= 2 for group in groups)
    assert store.num_resident == 2
    store.close()


def test_one_slot_is_enough(experts: ExpertFile) -> None:
    store = open_store(experts, slots=1)

    assert _acquire(store, experts, 0, [4, 2, 0]) == [[4], [2], [0]]
    assert _acquire(store, experts, 0, [0, 5]) == [[0], [5]]
    store.close()


def test_group_keeps_its_contents_until_the_next_is_asked_for(experts: ExpertFile) -> None:
    """While a group is in use, later loads of the same call are under way in other slots."""
    store = open_store(experts, slots=3, io_threads=3)
    _acquire(store, experts, 0, [0, 1])

    groups = store.acquire(0, [0, 1, 2, 3, 4, 5])
    first = next(groups)
    for _ in range(200):
        assert all(_is(weights, experts.experts[ExpertId(0, expert)]) for expert, weights in first)
    list(groups)
    store.close()


def test_least_recently_used_is_evicted(experts: ExpertFile) -> None:
    store = open_store(experts, slots=3)
    for expert in (0, 1, 2, 0):
        _acquire(store, experts, 0, [expert])

    _acquire(store, experts, 1, [5])

    reports = {report.layer: report for report in layers_report(store, {0: {Phase.DECODE: (3, 1)}})}
    assert reports[0].resident == (0, 2)
    assert reports[1].resident == (5,)
    assert (reports[0].hits, reports[0].misses, reports[0].activations[Phase.DECODE]) == (1, 3, (3, 1))
    assert reports[0].num_experts == experts.layout.num_experts
    assert (reports[1].hits, reports[1].misses) == (0, 1)
    store.close()


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16])
def test_contents_are_converted_to_the_held_dtype(tmp_path: Path, stored: torch.dtype, held: torch.dtype) -> None:
    file = write_experts(tmp_path, dtype=stored, num_experts=3, shift=8)
    store = open_store(file, slots=3, held_dtype=held)

    ((_, weights),) = next(iter(store.acquire(1, [2])))

    assert weights.gate.data.dtype == held
    assert _is(weights, file.experts[ExpertId(1, 2)])
    _acquire(store, file, 0, [0, 1, 2])
    store.close()


def test_converted_experts_count_as_held(experts: ExpertFile) -> None:
    assert held_expert_bytes(experts.layout, torch.bfloat16) < held_expert_bytes(experts.layout, torch.float32)
    store = open_store(experts, slots=4, held_dtype=torch.bfloat16)

    assert store.model_bytes == held_expert_bytes(experts.layout, torch.bfloat16)
    assert store.num_slots * store.slot_bytes <= store.budget_bytes
    store.close()


def test_budget_larger_than_the_model_takes_no_more_than_the_model(experts: ExpertFile) -> None:
    store = open_store(experts, slots=1000)

    assert store.num_slots == len(experts.experts)
    store.close()


def test_budget_too_small_says_the_minimum(experts: ExpertFile) -> None:
    slot = held_expert_bytes(experts.layout, torch.float32) // len(experts.experts)

    with pytest.raises(ConfigError, match=rf"experts\.cache.* minimum is {3 * slot} bytes"):
        open_store(experts, slots=2, min_experts=3)


@pytest.mark.parametrize("held", [torch.float32, torch.bfloat16])
def test_read_error_names_the_file_and_leaves_the_store_usable(tmp_path: Path, held: torch.dtype) -> None:
    file = write_experts(tmp_path, num_experts=NUM_EXPERTS)
    store = open_store(file, slots=3, held_dtype=held)
    whole = file.file.read_bytes()
    _acquire(store, file, 0, [0])

    with file.file.open("r+b") as stream:
        stream.truncate(len(whole) // 2)
    for _ in range(4):
        with pytest.raises(ExpertReadError, match=str(file.file)):
            list(store.acquire(1, [3, 4, 5]))
        _acquire(store, file, 0, [0, 1])
    with file.file.open("r+b") as stream:
        stream.write(whole)

    _acquire(store, file, 1, [3, 4, 5])
    _acquire(store, file, 0, range(NUM_EXPERTS))
    assert store.num_resident == 3
    store.close()


def test_matrices_far_apart_in_the_file_are_joined(aligned: ExpertFile) -> None:
    store = open_store(aligned, slots=2)

    _acquire(store, aligned, 0, range(NUM_EXPERTS))
    _acquire(store, aligned, 1, range(NUM_EXPERTS))
    store.close()


def test_bytes_read_grow_with_misses_and_not_with_hits(experts: ExpertFile) -> None:
    store = open_store(experts, slots=6)
    _acquire(store, experts, 0, [0, 1, 2])
    after_misses = store.bytes_read

    _acquire(store, experts, 0, [0, 1, 2])

    assert after_misses >= experts.layout.stored_bytes // len(experts.experts) * 3
    assert store.bytes_read == after_misses
    store.close()
