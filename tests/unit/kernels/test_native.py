"""Every compiled kernel of experts and rows against torch, at odd sizes; and a row does not depend on its batch."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from expert_builders import Matrices, dense_form, random_matrices
from kernel_values import INPUT_DTYPES, ODD_SIZES, WEIGHT_DTYPES, close
from torch import Tensor
from torch.nn import functional

from actors.kernels.native import NativeKernels, load_native

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": functional.silu,
    "gelu": functional.gelu,
    "gelu_pytorch_tanh": lambda x: functional.gelu(x, approximate="tanh"),
}


pytestmark = [
    pytest.mark.skipif(load_native() is None, reason="the compiled kernels were not built"),
    pytest.mark.usefixtures("one_thread"),
]


def _ffn(
    native: NativeKernels,
    experts: list[Matrices],
    x: Tensor,
    pairs_of: list[list[int]],
    *,
    top_k: int = 1,
    activation: str = "silu",
) -> Tensor:
    y = torch.full((len(x) * top_k, x.shape[1]), torch.nan)
    form = dense_form(experts[0].gate.dtype, activation).kernel_form()
    assert form is not None
    weights = [expert.weights() for expert in experts]
    native.experts_ffn(
        x,
        [expert.pointers for expert in weights],
        np.cumsum([0, *(len(pairs) for pairs in pairs_of)]),
        np.array([pair for pairs in pairs_of for pair in pairs], dtype=np.int64),
        y,
        form=form,
        intermediate=experts[0].gate.shape[0],
        top_k=top_k,
    )
    return y


@pytest.mark.parametrize("sizes", ODD_SIZES, ids=str)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_experts_ffn_equals_its_definition(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    hidden, intermediate = sizes
    expert = random_matrices(dtype, hidden=hidden, intermediate=intermediate, generator=generator)
    for rows in (1, 2, 3, 4, 5, 7, 9, 64, 65, 130):
        x = torch.randn(rows, hidden, generator=generator)

        y = _ffn(native, [expert], x, [list(range(rows))])

        close(y, expert.ffn(x))


@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_experts_ffn_takes_rows_in_both_dtypes(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype
) -> None:
    expert = random_matrices(torch.bfloat16, hidden=40, intermediate=24, generator=generator)
    x = torch.randn(6, 40, generator=generator).to(dtype)

    close(_ffn(native, [expert], x, [list(range(6))]), expert.ffn(x))


@pytest.mark.parametrize("activation", sorted(ACTIVATIONS))
def test_activations_equal_torch_also_far_from_zero(native: NativeKernels, activation: str) -> None:
    """With identity matrices the result is act(x) * x."""
    identity = torch.eye(16)
    expert = Matrices(identity, identity, identity)
    x = torch.cat([torch.linspace(-12, 12, 160), torch.tensor([-200.0, -88.5, -30.0, 0.0, 30.0, 88.5, 200.0, 1e-20])])
    x = torch.cat([x, torch.zeros(-len(x) % 16)]).view(-1, 16)

    y = _ffn(native, [expert], x, [list(range(len(x)))], activation=activation)

    close(y, ACTIVATIONS[activation](x.double()) * x.double())
    assert torch.isfinite(y).all()


def test_experts_ffn_writes_the_pairs_it_was_given_and_no_others(
    native: NativeKernels, generator: torch.Generator
) -> None:
    experts = [random_matrices(torch.float32, hidden=24, intermediate=16, generator=generator) for _ in range(3)]
    x = torch.randn(4, 24, generator=generator)

    y = _ffn(native, experts, x, [[0, 7], [], [3]], top_k=2)

    close(y[[0, 7, 3]], torch.cat([experts[0].ffn(x[[0, 3]]), experts[2].ffn(x[[1]])]))
    assert torch.isnan(y[[1, 2, 4, 5, 6]]).all()


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("sizes", [(32, 48), (40, 24), (17, 33), (5, 3)], ids=str)
def test_threads_change_no_bit(generator: torch.Generator, threads: int, sizes: tuple[int, int]) -> None:
    hidden, intermediate = sizes
    experts = [
        random_matrices(torch.bfloat16, hidden=hidden, intermediate=intermediate, generator=generator) for _ in range(2)
    ]
    x = torch.randn(9, hidden, generator=generator)
    one, several = load_native(threads=1), load_native(threads=threads)
    assert one is not None and several is not None

    pairs = [[0, 1, 2, 3], [4, 5, 6, 7, 8]]
    assert torch.equal(_ffn(several, experts, x, pairs), _ffn(one, experts, x, pairs))


@pytest.mark.parametrize("sizes", [(32, 48), (256, 64), (40, 24), (17, 33)], ids=str)
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_experts_ffn_of_a_row_does_not_depend_on_its_batch(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype, sizes: tuple[int, int]
) -> None:
    hidden, intermediate = sizes
    expert = random_matrices(dtype, hidden=hidden, intermediate=intermediate, generator=generator)
    x = torch.randn(70, hidden, generator=generator)
    alone = torch.cat([_ffn(native, [expert], x[i : i + 1], [[0]]) for i in range(len(x))])

    for rows in (2, 3, 4, 5, 8, 9, 64, 65, 70):
        assert torch.equal(_ffn(native, [expert], x[:rows], [list(range(rows))]), alone[:rows]), f"{rows} rows"


@pytest.mark.parametrize("sizes", [*ODD_SIZES, (256, 70)], ids=str)
@pytest.mark.parametrize("weight_dtype", WEIGHT_DTYPES, ids=str)
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_linear_equals_torch_and_rows_are_independent(
    native: NativeKernels,
    generator: torch.Generator,
    dtype: torch.dtype,
    weight_dtype: torch.dtype,
    sizes: tuple[int, int],
) -> None:
    inputs, outputs = sizes
    weight = torch.randn(outputs, inputs, generator=generator).to(weight_dtype) / inputs**0.5
    x = torch.randn(70, inputs, generator=generator).to(dtype)
    alone = torch.cat([native.linear(x[i : i + 1], weight) for i in range(len(x))])

    for rows in (1, 2, 3, 4, 5, 6, 7, 8, 9, 31, 32, 33, 70):
        y = native.linear(x[:rows], weight)

        close(y, x[:rows].double() @ weight.double().T, dtype)
        assert torch.equal(y, alone[:rows]), f"{rows} rows"
        assert y.dtype == dtype


def test_linear_keeps_leading_dims_and_takes_strided_rows(native: NativeKernels, generator: torch.Generator) -> None:
    weight, x = torch.randn(8, 16, generator=generator), torch.randn(1, 3, 32, generator=generator)[..., ::2]

    y = native.linear(x, weight)

    assert y.shape == (1, 3, 8)
    close(y, x @ weight.T)


@pytest.mark.parametrize("special", [torch.inf, -torch.inf, torch.nan, 65504.0, -65504.0, 6e-8, 0.0, -0.0])
@pytest.mark.parametrize("width", [1, 16, 21])
@pytest.mark.parametrize("dtype", WEIGHT_DTYPES, ids=str)
def test_every_weight_value_is_widened_exactly(
    native: NativeKernels, dtype: torch.dtype, width: int, special: float
) -> None:
    """Infinity, nan, subnormals and signed zeros of half and bfloat16, in the vector part and in the rest."""
    for position in {0, width - 1}:
        weight = torch.zeros(1, width)
        weight[0, position] = special
        weight = weight.to(dtype)
        x = torch.zeros(1, width)
        x[0, position] = 1.0

        y = native.linear(x, weight)

        assert torch.equal(y, weight[:, position].float().view(1, 1)) or (y.isnan().all() and weight.isnan().any())


def test_all_halves_are_widened_exactly(native: NativeKernels) -> None:
    """Each of the 65,536 bit patterns, as a weight matrix of one column and as rows of a vector."""
    halves = torch.arange(-32768, 32768, dtype=torch.int32).to(torch.int16).view(torch.float16)
    finite = halves[torch.isfinite(halves)]

    narrow = native.linear(torch.ones(1, 1), halves.view(-1, 1)).flatten()
    padded = torch.zeros(len(finite), 16, dtype=torch.float16)
    padded[:, 3] = finite
    one = torch.zeros(1, 16)
    one[0, 3] = 1.0
    wide = native.linear(one, padded).flatten()

    assert torch.equal(narrow.nan_to_num(7e37), halves.float().nan_to_num(7e37))
    assert torch.equal(wide, finite.float())


def test_results_are_rounded_to_the_nearest_even_bfloat16(native: NativeKernels, generator: torch.Generator) -> None:
    special = torch.tensor([torch.inf, -torch.inf, torch.nan, 3.4e38, 1e-40, -0.0, 1.00390625, 1.01171875])
    values = torch.cat([special, torch.randn(1000, generator=generator)]).view(1, -1)

    out = native.combine(values, torch.ones(1, 1), torch.bfloat16)

    torch.testing.assert_close(out, values.to(torch.bfloat16), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("width", [1, 15, 16, 17, 100, 256])
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_combine_sums_in_gate_order(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype, width: int
) -> None:
    for rows, top_k in ((1, 1), (3, 2), (9, 8)):
        y = torch.randn(rows * top_k, width, generator=generator)
        weights = torch.rand(rows, top_k, generator=generator)

        out = native.combine(y, weights, dtype)

        close(out, (weights.double()[..., None] * y.double().view(rows, top_k, width)).sum(dim=1), dtype)
        assert out.dtype == dtype


def test_group_sorts_choices_stably(native: NativeKernels, generator: torch.Generator) -> None:
    for shape, num_experts in (((1, 1), 1), ((7, 4), 32), ((300, 8), 64), ((5, 2), 3)):
        ids = torch.randint(0, num_experts, shape, generator=generator)

        wanted, offsets, pairs = native.group(ids, num_experts)

        flat = ids.numpy().reshape(-1)
        chosen = np.bincount(flat, minlength=num_experts)
        assert wanted == np.flatnonzero(chosen).tolist()
        assert offsets.tolist() == [0, *np.cumsum(chosen[wanted]).tolist()]
        assert pairs.tolist() == np.argsort(flat, kind="stable").tolist()


@pytest.mark.parametrize("width", [1, 15, 16, 33, 64, 128])
@pytest.mark.parametrize("dtype", INPUT_DTYPES, ids=str)
def test_rms_norm_equals_the_models_own(
    native: NativeKernels, generator: torch.Generator, dtype: torch.dtype, width: int
) -> None:
    x = (5 * torch.randn(1, 7, 3, width, generator=generator)).to(dtype)
    weight = torch.randn(width, generator=generator).to(dtype)

    y = native.rms_norm(x, weight, 1e-6)

    wide = x.float()
    normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)
    close(y, weight * normed.to(dtype), dtype)
    assert (y.dtype, y.shape) == (dtype, x.shape)
    assert torch.equal(native.rms_norm(x[:, 2:3], weight, 1e-6), y[:, 2:3])


def test_read_bandwidth_is_plausible(native: NativeKernels) -> None:
    assert 1e7 < native.read_bandwidth(1 << 20) < 1e13
