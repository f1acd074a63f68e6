"""Dispatch and combine equal the dense definition, and no cache state changes a bit of the result."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
import torch
from expert_builders import HIDDEN, ExpertFile, dense_form, dense_moe, open_store, random_routing, write_experts
from hypothesis import given, settings
from torch import Tensor

from actors.experts.backend import ExpertBackend
from actors.experts.compute import ExpertCompute
from actors.experts.dispatch import LocalDispatcher
from actors.experts.memory.store import ExpertStore
from actors.gates.activation_recorder import ActivationRecorder
from actors.gates.work import ExpertWork
from actors.kernels.native import load_native

pytestmark = pytest.mark.usefixtures("one_thread")

NUM_EXPERTS, TOP_K = 8, 3


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), num_experts=NUM_EXPERTS)


@pytest.fixture(scope="module", params=["native", "torch"])
def compute(request: pytest.FixtureRequest) -> ExpertCompute:
    native = load_native() if request.param == "native" else None
    if request.param == "native" and native is None:
        pytest.skip("the compiled kernels were not built")
    return ExpertCompute(native, dense_form(torch.float32), compute_dtype=torch.float32)


def _rows(num: int, generator: torch.Generator) -> Tensor:
    return torch.randn(num, HIDDEN, generator=generator)


def _run(
    experts: ExpertFile, compute: ExpertCompute, work: ExpertWork, *, slots: int = 16, num_rows: int | None = None
) -> Tensor:
    dispatcher = _dispatcher(open_store(experts, slots=slots), compute)
    try:
        return dispatcher.start(work, len(work.hidden_TD) if num_rows is None else num_rows, 0)()
    finally:
        dispatcher.close()


def _dispatcher(store: ExpertStore, compute: ExpertCompute) -> LocalDispatcher:
    recorder = ActivationRecorder(store.layout.layers, NUM_EXPERTS, None)
    return LocalDispatcher(ExpertBackend(store, compute), recorder)


@settings(max_examples=8, deadline=None)
@given(rows=st.integers(1, 40), padding=st.integers(0, 5), slots=st.integers(1, 16), seed=st.integers(0, 2**31))
def test_any_routing_equals_the_dense_definition(
    experts: ExpertFile, compute: ExpertCompute, rows: int, padding: int, slots: int, seed: int
) -> None:
    generator = torch.Generator().manual_seed(seed)
    x = _rows(rows + padding, generator)
    ids, weights = random_routing(rows + padding, TOP_K, range(NUM_EXPERTS), generator)

    out = _run(experts, compute, ExpertWork(1, x, ids, weights), slots=slots, num_rows=rows)

    expected = dense_moe(experts.experts, 1, x[:rows], ids[:rows], weights[:rows])
    torch.testing.assert_close(out[:rows].double(), expected, rtol=1e-4, atol=1e-5)
    assert out.shape == x.shape
    assert not out[rows:].any(), "padding rows must be zero"


def test_one_expert_may_take_every_row(experts: ExpertFile, compute: ExpertCompute) -> None:
    generator = torch.Generator().manual_seed(0)
    x = _rows(150, generator)
    ids, weights = torch.full((150, 1), 5), torch.rand(150, 1, generator=generator)

    out = _run(experts, compute, ExpertWork(0, x, ids, weights))

    torch.testing.assert_close(out.double(), dense_moe(experts.experts, 0, x, ids, weights), rtol=1e-4, atol=1e-5)


def test_padding_rows_reach_no_expert_and_no_counter(experts: ExpertFile, compute: ExpertCompute) -> None:
    generator = torch.Generator().manual_seed(0)
    x = _rows(4, generator)
    x[2:] = torch.nan
    ids, weights = torch.tensor([[0, 1], [1, 2], [6, 7], [6, 7]]), torch.full((4, 2), 0.5)
    store = open_store(experts, slots=16)
    dispatcher = _dispatcher(store, compute)
    recorder = dispatcher.recorder

    out = dispatcher.start(ExpertWork(0, x, ids, weights), 2, 1)()

    assert torch.isfinite(out).all()
    recorder.settle()
    assert recorder.counts[0].tolist() == [[0, 1, 1, 0, 0, 0, 0, 0], [1, 1, 0, 0, 0, 0, 0, 0]]
    assert recorder.counts[1].tolist() == [[0] * NUM_EXPERTS] * 2
    assert store.counters.num_misses == 3
    store.close()


def test_result_is_the_same_to_the_bit_for_every_cache_size_and_state(
    experts: ExpertFile, compute: ExpertCompute
) -> None:
    generator = torch.Generator().manual_seed(3)
    x = _rows(23, generator)
    ids, weights = random_routing(23, TOP_K, range(NUM_EXPERTS), generator)
    work = ExpertWork(0, x, ids, weights)
    expected = _run(experts, compute, work)

    for slots in (1, 2, 3, 5, 8):
        store = open_store(experts, slots=slots, io_threads=3)
        dispatcher = _dispatcher(store, compute)
        for warm in ([], [7, 1], [4]):
            list(store.acquire(0, warm[:slots]))
            list(store.acquire(1, [2]))
            assert torch.equal(dispatcher.start(work, 23, 0)(), expected), f"{slots} slots after {warm}"
        store.close()


def test_row_gets_the_same_result_in_any_batch(experts: ExpertFile) -> None:
    """In float32 with the compiled kernels; torch's matmuls promise it only nearly."""
    native = load_native()
    if native is None:
        pytest.skip("the compiled kernels were not built")
    compute = ExpertCompute(native, dense_form(torch.float32), compute_dtype=torch.float32)
    generator = torch.Generator().manual_seed(4)
    x = _rows(70, generator)
    ids, weights = random_routing(70, TOP_K, range(NUM_EXPERTS), generator)

    together = _run(experts, compute, ExpertWork(0, x, ids, weights))

    for size in (1, 2, 5, 16):
        for start in range(0, 70 - size, 13):
            part = slice(start, start + size)
            assert torch.equal(_run(experts, compute, ExpertWork(0, x[part], ids[part], weights[part])), together[part])


def test_experts_are_summed_in_gate_order(compute: ExpertCompute) -> None:
    """1e8 + 1 - 1e8 is 0 in float32 in this order and 1 in another."""
    y = torch.tensor([[1e8], [1.0], [-1e8]]).repeat(2, 1)
    y[3:] = torch.tensor([[1e8], [-1e8], [1.0]])

    out = compute.combine(y, torch.ones(2, 3), torch.float32)

    assert out.flatten().tolist() == [0.0, 1.0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_result_has_the_dtype_of_the_rows(experts: ExpertFile, compute: ExpertCompute, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(5)
    x = _rows(3, generator).to(dtype)
    ids, weights = random_routing(3, 2, range(NUM_EXPERTS), generator)

    out = _run(experts, compute, ExpertWork(0, x, ids, weights.to(dtype)))

    expected = dense_moe(experts.experts, 0, x, ids, weights.to(dtype))
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), expected, rtol=1e-2, atol=1e-2)


def test_choices_of_other_processes_add_nothing(experts: ExpertFile, compute: ExpertCompute) -> None:
    generator = torch.Generator().manual_seed(6)
    x = _rows(9, generator)
    ids, weights = random_routing(9, TOP_K, range(NUM_EXPERTS), generator)
    here = torch.rand(9, TOP_K, generator=generator) < 0.5
    store = open_store(experts, slots=16)
    backend = ExpertBackend(store, compute)

    mine = backend.partial_sums(1, x, ids.where(here, torch.tensor(NUM_EXPERTS)), weights * here)
    others = backend.partial_sums(1, x, ids.where(~here, torch.tensor(NUM_EXPERTS)), weights * ~here)

    expected = dense_moe(experts.experts, 1, x, ids, weights)
    torch.testing.assert_close((mine + others).double(), expected, rtol=1e-4, atol=1e-5)
    assert mine.dtype == torch.float32
    store.close()
