"""The compiled path and the torch path agree, and each is correct where the other is missing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from expert_builders import Matrices, dense_form, random_matrices
from torch import Tensor

from actors.experts.compute import ExpertCompute, KernelPlan
from actors.kernels.native import NativeKernels, load_native

pytestmark = pytest.mark.usefixtures("one_thread")

HIDDEN, INTERMEDIATE = 48, 32


@pytest.fixture
def native() -> NativeKernels:
    kernels = load_native()
    if kernels is None:
        pytest.skip("the compiled kernels were not built")
    return kernels


def _experts(num: int, dtype: torch.dtype) -> list[Matrices]:
    generator = torch.Generator().manual_seed(num)
    return [random_matrices(dtype, hidden=HIDDEN, intermediate=INTERMEDIATE, generator=generator) for _ in range(num)]


def _run(compute: ExpertCompute, experts: list[Matrices], counts: list[int], x: Tensor) -> Tensor:
    """Expert e computes the next counts[e] rows of x."""
    y = torch.full((len(x), HIDDEN), torch.nan)
    offsets = np.cumsum([0, *counts])
    compute.run(x, [e.weights() for e in experts], offsets, np.arange(len(x)), y, top_k=1)
    return y


def _expected(experts: list[Matrices], counts: list[int], x: Tensor) -> Tensor:
    parts = torch.split(x, counts)
    return torch.cat([expert.ffn(part) for expert, part in zip(experts, parts, strict=True)])


@pytest.mark.parametrize("weight_dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_paths_agree_in_float32(native: NativeKernels, weight_dtype: torch.dtype) -> None:
    experts, counts = _experts(3, weight_dtype), [1, 7, 20]
    x = torch.randn(28, HIDDEN)
    expected = _expected(experts, counts, x)

    for kernels in (native, None):
        compute = ExpertCompute(kernels, dense_form(weight_dtype), compute_dtype=torch.float32)
        torch.testing.assert_close(_run(compute, experts, counts, x).double(), expected, rtol=1e-4, atol=1e-5)


def test_fallback_in_bfloat16_is_close(native: NativeKernels) -> None:
    experts, counts = _experts(2, torch.bfloat16), [5, 3]
    x = torch.randn(8, HIDDEN).to(torch.bfloat16).float()
    expected = _expected(experts, counts, x)

    for kernels in (native, None):
        compute = ExpertCompute(kernels, dense_form(torch.bfloat16), compute_dtype=torch.bfloat16)
        torch.testing.assert_close(_run(compute, experts, counts, x).double(), expected, rtol=5e-2, atol=2e-2)


@pytest.mark.parametrize("threshold", [0, 1, 4, 6, 1 << 30])
def test_any_split_between_the_paths_gives_the_same(native: NativeKernels, threshold: int) -> None:
    experts, counts = _experts(4, torch.float32), [1, 5, 4, 9]
    x = torch.randn(19, HIDDEN)
    compute = ExpertCompute(native, dense_form(torch.float32), compute_dtype=torch.float32)
    compute.plan = KernelPlan(threshold, "as the test says")

    y = _run(compute, experts, counts, x)

    torch.testing.assert_close(y.double(), _expected(experts, counts, x), rtol=1e-4, atol=1e-5)


def test_pairs_name_rows_and_output_rows(native: NativeKernels) -> None:
    """Pair t * K + k: row t in, output row t * K + k out; rows of other pairs stay untouched."""
    experts = _experts(2, torch.float32)
    x = torch.randn(3, HIDDEN)
    for kernels in (native, None):
        compute = ExpertCompute(kernels, dense_form(torch.float32), compute_dtype=torch.float32)
        y = torch.full((6, HIDDEN), 123.0)
        pairs, offsets = np.array([1, 4, 2]), np.array([0, 2, 3])

        compute.run(x, [e.weights() for e in experts], offsets, pairs, y, top_k=2)

        expected = torch.stack([experts[0].ffn(x[0]), experts[0].ffn(x[2]), experts[1].ffn(x[1])])
        torch.testing.assert_close(y[pairs].double(), expected, rtol=1e-4, atol=1e-5)
        assert (y[[0, 3, 5]] == 123.0).all()


@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_pytorch_tanh", "relu"])
def test_activations_agree(native: NativeKernels, activation: str) -> None:
    """relu has no compiled kernel: the fallback answers."""
    experts, x = _experts(1, torch.float32), 3 * torch.randn(4, HIDDEN)
    results = [
        _run(
            ExpertCompute(kernels, dense_form(torch.float32, activation), compute_dtype=torch.float32), experts, [4], x
        )
        for kernels in (native, None)
    ]

    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-5)


def test_combine_agrees_with_the_fallback(native: NativeKernels) -> None:
    y, weights = torch.randn(5 * 4, 37), torch.rand(5, 4)
    computes = [ExpertCompute(k, dense_form(torch.float32), compute_dtype=torch.float32) for k in (native, None)]

    for dtype in (torch.float32, torch.bfloat16):
        ours, plain = (c.combine(y, weights, dtype) for c in computes)
        torch.testing.assert_close(ours, plain, rtol=1e-2 if dtype == torch.bfloat16 else 1e-6, atol=1e-6)


def test_calibration_keeps_the_compiled_path_in_float32(native: NativeKernels) -> None:
    compute = ExpertCompute(native, dense_form(torch.float32), compute_dtype=torch.float32)

    plan = compute.calibrate(HIDDEN, INTERMEDIATE)

    assert plan.label == "native"
    assert compute.plan is plan


def test_calibration_in_bfloat16_says_what_it_chose(native: NativeKernels) -> None:
    plan = ExpertCompute(native, dense_form(torch.bfloat16), compute_dtype=torch.bfloat16).calibrate(32, 16)

    assert plan.label.startswith("native")
    assert plan.torch_from_rows > 1


def test_without_the_compiled_kernels_the_plan_is_torch() -> None:
    compute = ExpertCompute(None, dense_form(torch.float32), compute_dtype=torch.float32)

    assert compute.calibrate(HIDDEN, INTERMEDIATE).label == "torch"
