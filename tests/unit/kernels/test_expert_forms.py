"""Experts in every form: kernel and fallback against the definition; batches, threads and instruction sets."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from actors.experts.compute import ExpertCompute
from actors.kernels.native import KernelForm, NativeKernels, load_native
from actors.weights.activation_functions import Activation
from actors.weights.formats.base import Matrix
from actors.weights.formats.dense import DenseFormat
from actors.weights.formats.expert import ExpertForm, ExpertWeights
from actors.weights.formats.fp8_block import Fp8BlockFormat
from actors.weights.formats.mxfp4 import Mxfp4Format

SILU, SWIGLU = Activation("silu"), Activation("clamped_swiglu", 1.702, 7.0)
BF16, F32, F16 = torch.bfloat16, torch.float32, torch.float16
FORMS = {
    "fp8": ExpertForm(format=Fp8BlockFormat(128, 128), activation=SILU),
    "fp8, small blocks": ExpertForm(format=Fp8BlockFormat(24, 32, BF16), activation=SILU, bias_dtype=F32),
    "mxfp4 of gpt-oss": ExpertForm(format=Mxfp4Format(), activation=SWIGLU, interleaved=True, bias_dtype=BF16),
    "mxfp4, apart": ExpertForm(format=Mxfp4Format(), activation=SILU),
    "bf16 of gpt-oss": ExpertForm(
        format=DenseFormat(BF16), activation=SWIGLU, transposed=True, interleaved=True, bias_dtype=BF16
    ),
    "fp32 transposed": ExpertForm(format=DenseFormat(F32), activation=SILU, transposed=True),
    "fp16 transposed": ExpertForm(format=DenseFormat(F16), activation=SILU, transposed=True, bias_dtype=F16),
    "fp32 interleaved": ExpertForm(format=DenseFormat(F32), activation=SWIGLU, interleaved=True),
    "bf16 with bias": ExpertForm(format=DenseFormat(BF16), activation=SILU, bias_dtype=BF16),
}
ISA_LIMITS = (0, 3, 1)  # this machine's best, AVX2 at most, portable

pytestmark = [
    pytest.mark.skipif(load_native() is None, reason="the compiled kernels were not built"),
    pytest.mark.usefixtures("one_thread"),
]


@pytest.fixture(scope="module")
def native() -> NativeKernels:
    kernels = load_native()
    assert kernels is not None
    return kernels


def _sizes(form: ExpertForm) -> list[tuple[int, int]]:
    """(hidden, intermediate): multiples of everything, and as odd as the format takes."""
    return [(128, 96), (64, 160)] if isinstance(form.format, Mxfp4Format) else [(128, 96), (40, 24), (67, 35)]


def _expert(form: ExpertForm, hidden: int, intermediate: int, seed: int = 0) -> ExpertWeights:
    torch.manual_seed(seed)
    expert = ExpertWeights.random(form, hidden, intermediate)
    for matrix in (expert.gate, expert.up, expert.down):
        if matrix is None or matrix.scales is None:
            continue
        if matrix.scales.dtype == torch.uint8:
            matrix.scales.copy_(torch.randint(118, 126, matrix.scales.shape))
        else:
            matrix.scales.copy_(torch.rand(matrix.scales.shape) / 1000)
    return expert


def _definition(form: ExpertForm, expert: ExpertWeights, x: Tensor) -> Tensor:
    def project(rows: Tensor, matrix: Matrix) -> Tensor:
        weight = form.format.dequantize(matrix).double()
        out = rows @ (weight if form.transposed else weight.T)
        return out if matrix.bias is None else out + matrix.bias.double()

    gate = project(x.double(), expert.gate)
    gate, up = (gate[:, ::2], gate[:, 1::2]) if expert.up is None else (gate, project(x.double(), expert.up))
    return project(form.activation(gate, up), expert.down)


def _run(native: NativeKernels, kernel: KernelForm, expert: ExpertWeights, x: Tensor, intermediate: int) -> Tensor:
    y = torch.full(x.shape, torch.nan)
    pairs = np.arange(len(x))
    native.experts_ffn(
        x, [expert.pointers], np.array([0, len(x)]), pairs, y, form=kernel, intermediate=intermediate, top_k=1
    )
    return y


def _kernel(form: ExpertForm) -> KernelForm:
    kernel = form.kernel_form()
    assert kernel is not None
    return kernel


@pytest.mark.parametrize("isa_limit", ISA_LIMITS)
@pytest.mark.parametrize("name", FORMS)
def test_kernel_equals_the_definition_whatever_the_batch(native: NativeKernels, name: str, isa_limit: int) -> None:
    form = FORMS[name]
    kernel = _kernel(form)
    kernel.isa_limit = isa_limit
    for hidden, intermediate in _sizes(form):
        expert = _expert(form, hidden, intermediate)
        x = torch.randn(67, hidden) / hidden**0.5
        expected = _definition(form, expert, x)
        scale = expected.abs().mean()
        whole = _run(native, kernel, expert, x, intermediate)
        torch.testing.assert_close(whole.double() / scale, expected / scale, rtol=2e-4, atol=2e-4)
        for rows in (1, 2, 3, 4, 5, 7, 64):
            part = _run(native, kernel, expert, x[:rows], intermediate)
            assert torch.equal(part, whole[:rows]), f"{rows} rows of {hidden} x {intermediate}"


@pytest.mark.parametrize("name", FORMS)
def test_threads_change_no_bit(native: NativeKernels, name: str) -> None:
    form = FORMS[name]
    three = load_native(threads=3)
    assert three is not None
    for hidden, intermediate in _sizes(form):
        expert, x = _expert(form, hidden, intermediate), torch.randn(5, hidden)
        alone, shared = (_run(k, _kernel(form), expert, x, intermediate) for k in (native, three))
        assert torch.equal(alone, shared)


@pytest.mark.parametrize("name", FORMS)
def test_fallback_and_kernel_agree(native: NativeKernels, name: str) -> None:
    form = FORMS[name]
    hidden, intermediate = _sizes(form)[0]
    experts = [_expert(form, hidden, intermediate, seed) for seed in range(2)]
    for dtype, tolerance in ((F32, 2e-4), (BF16, 3e-2)):
        x = (torch.randn(9, hidden) / hidden**0.5).to(dtype)
        results: list[Tensor] = []
        for kernels in (native, None):
            y = torch.full((9, hidden), torch.nan)
            compute = ExpertCompute(kernels, form, compute_dtype=dtype)
            compute.run(x, experts, np.array([0, 4, 9]), np.arange(9), y, top_k=1)
            results.append(y)
        scale = results[0].abs().mean()
        torch.testing.assert_close(results[1] / scale, results[0] / scale, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("isa_limit", ISA_LIMITS)
@pytest.mark.parametrize("position", [0, 1, 30, 31])
def test_every_code_is_decoded_exactly(native: NativeKernels, isa_limit: int, position: int) -> None:
    """Gate row r holds code r in one column, up holds ones, down is the identity: output r is silu(value of code r)."""
    for form, size in ((FORMS["fp8"], 256), (FORMS["mxfp4, apart"], 32)):
        parts = [torch.zeros(form.shape(part, size, size), dtype=torch.uint8) for part in form.part_names]
        gate, up, down, *scales = parts
        if isinstance(form.format, Mxfp4Format):
            shift = 4 * (position % 2)
            gate[:, 0, position // 2] = (torch.arange(32, dtype=torch.uint8) % 16) << shift
            up[:, 0, position // 2] = 2 << shift  # the code of 1
            down[torch.arange(32), 0, torch.arange(32) // 2] = (2 << (4 * (torch.arange(32) % 2))).to(torch.uint8)
            scales = [torch.full_like(scale, 127) for scale in scales]
            scales[0][:, 0] = torch.arange(96, 128)
        else:
            gate[:, position] = torch.arange(256, dtype=torch.uint8)
            gate[[127, 255], position] = 0  # not a number
            up[:, position] = 56  # the code of 1
            down.diagonal().fill_(56)
            gate, up, down = (t.view(torch.float8_e4m3fn) for t in (gate, up, down))
            scales = [torch.full(scale.shape, value) for scale, value in zip(scales, (0.019, 1.0, 1.0), strict=True)]
        expert = ExpertWeights.of(form, [gate, up, down, *scales])
        x = torch.zeros(1, size)
        x[0, position] = 1.0
        kernel = _kernel(form)
        kernel.isa_limit = isa_limit

        y = _run(native, kernel, expert, x, size)

        values = form.format.dequantize(expert.gate)[:, position]
        assert len(values.unique()) >= (200 if size == 256 else 28)
        torch.testing.assert_close(y[0], torch.nn.functional.silu(values), rtol=2e-6, atol=0.0)


def test_calibration_takes_every_form(native: NativeKernels) -> None:
    for form in FORMS.values():
        plan = ExpertCompute(native, form, compute_dtype=BF16).calibrate(64, 32)
        assert plan.label.startswith("native")


def test_activation_without_a_compiled_kernel_is_computed_by_torch(native: NativeKernels) -> None:
    form = replace(FORMS["fp8"], activation=Activation("relu"))
    expert, x = _expert(form, 64, 32), torch.randn(3, 64)
    compute = ExpertCompute(native, form, compute_dtype=F32)
    y = torch.empty(3, 64)

    compute.run(x, [expert], np.array([0, 3]), np.arange(3), y, top_k=1)

    assert compute.plan.label == "torch"
    torch.testing.assert_close(y.double(), _definition(form, expert, x), rtol=1e-4, atol=1e-4)
