"""The compiled draw finds the very token that a full sort finds, without sorting."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from torch import Tensor

from actors.engine.sampling import sample
from actors.kernels.sampling import Draw, SamplingKernel, load_sampling_kernel
from cluster.types import SamplingParams

pytestmark = [
    pytest.mark.skipif(load_sampling_kernel() is None, reason="the compiled kernels were not built"),
    pytest.mark.usefixtures("one_thread"),
]

FILTERS: list[dict[str, Any]] = [
    {},
    {"top_p": 0.9},
    {"top_p": 0.999999},
    {"top_p": 1e-9},
    {"top_k": 1},
    {"top_k": 50},
    {"top_k": 10**6},
    {"min_p": 0.05},
    {"min_p": 1.0},
    {"top_p": 0.5, "top_k": 300},
    {"top_p": 0.95, "top_k": 1000, "min_p": 1e-4},
]


def _kernel() -> SamplingKernel:
    kernel = load_sampling_kernel()
    assert kernel is not None
    return kernel


def _draw(uniform: float, **fields: Any) -> Draw:
    return Draw(**({"temperature": 1.0, "top_p": 1.0, "min_p": 0.0, "top_k": 0} | fields), uniform=uniform)


class Unclear(Exception):
    """A sum falls so near its bound that rounding decides."""


def _exceeds(mass: Fraction, bound: float, total: Fraction, *, exact: bool) -> int:
    """-1, 0, 1: below, at, above the bound."""
    difference = mass - Fraction(bound)
    if not exact and abs(difference) <= Fraction(1e-12) * total:
        raise Unclear
    return (difference > 0) - (difference < 0)


def _by_full_sort(weights: np.ndarray, draw: Draw) -> int:
    """By the definitions: all tokens sorted by weight, equal ones by id, and sums without rounding."""
    exact = set(weights.tolist()) <= {0.0, 1.0}
    ids = [int(i) for i in range(len(weights)) if weights[i] > 0]
    if draw.top_k > 0 or draw.top_p < 1:
        ids.sort(key=lambda i: (-weights[i], i))
    if draw.top_k > 0:
        ids = ids[: draw.top_k]
    total = sum((Fraction(weights[i]) for i in ids), Fraction(0))
    if draw.top_p < 1:
        mass, kept = Fraction(0), []
        for i in ids:
            kept.append(i)
            mass += Fraction(weights[i])
            if _exceeds(mass, draw.top_p * float(total), total, exact=exact) >= 0:
                break
        ids, total = kept, mass
    mass = Fraction(0)
    for i in ids:
        mass += Fraction(weights[i])
        if _exceeds(mass, draw.uniform * float(total), total, exact=exact) > 0:
            return i
    return ids[-1]


_LOGITS = st.one_of(
    st.lists(st.floats(-30, 30, width=32), min_size=1, max_size=80),
    st.lists(st.sampled_from([0.0, -0.0, 1.0, 2.5, -3.0, 1e-38, -torch.inf, 80.0]), min_size=1, max_size=80),
    st.integers(1, 90).map(lambda n: [1.5] * n),
    st.lists(st.integers(0, 3), min_size=49, max_size=300).map(lambda row: [value / 64 for value in row]),
)


@settings(max_examples=400, deadline=None)
@given(
    logits=_LOGITS,
    temperature=st.sampled_from([1.0, 0.7, 3.0, 1e-3, 1e-30, 1e-310, 1e6, 1e300]),
    top_p=st.one_of(st.just(1.0), st.floats(1e-9, 1.0), st.sampled_from([0.5, 0.25, 0.9])),
    top_k=st.one_of(st.just(0), st.integers(1, 320)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    uniform=st.floats(0, 1, exclude_max=True),
)
def test_draw_is_that_of_a_full_sort(
    logits: list[float], temperature: float, top_p: float, top_k: int, min_p: float, uniform: float
) -> None:
    assume(max(logits) > -torch.inf)
    kernel, row = _kernel(), torch.tensor(logits)
    draw = _draw(uniform, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p)
    weights, _ = kernel.weights(row, draw)
    try:
        expected = _by_full_sort(weights, draw)
    except Unclear:
        assume(False)
        return

    assert kernel.draw(row[None], [draw]) == [expected]


@pytest.mark.parametrize("temperature", [1.0, 0.3, 2.0])
def test_weights_are_those_of_the_softmax(temperature: float) -> None:
    logits = 6 * torch.randn(3001, generator=torch.Generator().manual_seed(1))
    logits[17] = -torch.inf

    weights, total = _kernel().weights(logits, _draw(0.0, temperature=temperature))

    expected = torch.softmax(logits.double() / temperature, dim=-1)
    torch.testing.assert_close(torch.from_numpy(weights) / total, expected, rtol=1e-13, atol=0)


@pytest.mark.parametrize("filters", FILTERS, ids=str)
@pytest.mark.parametrize("shape", ["peaked", "flat", "coarse", "banned"])
def test_tokens_are_those_of_the_sorting_draw_for_the_same_seed(filters: dict[str, Any], shape: str) -> None:
    generator = torch.Generator().manual_seed(5)
    logits = torch.randn(24, 5003, generator=generator) * (4 if shape == "peaked" else 1)
    if shape == "coarse":  # as a model in bfloat16 gives them: many are equal
        logits = logits.bfloat16().float()
    if shape == "banned":
        logits[:, ::3] = -torch.inf
    params = [SamplingParams(max_tokens=1, temperature=0.2 + i / 8, seed=i, **filters) for i in range(24)]
    keys = [(i % 3, 7 * i) for i in range(24)]
    rest = ([()] * 24, [None] * 24)

    fast, _ = sample(logits, params, keys, *rest, _kernel())

    assert fast == sample(logits, params, keys, *rest)[0]


def test_rows_without_a_number_to_draw_from_are_said() -> None:
    rows = torch.zeros(4, 20)
    rows[0, 3], rows[1, 19], rows[2] = torch.nan, torch.inf, -torch.inf

    assert _kernel().draw(rows, [_draw(0.5, top_p=0.9)] * 4)[:3] == [-1, -1, -1]


def test_rows_that_lie_apart_are_drawn_from_as_if_they_lay_together() -> None:
    wide = torch.randn(6, 300, generator=torch.Generator().manual_seed(2))
    draws = [_draw(0.1 + i / 8, top_p=0.8) for i in range(3)]

    assert _kernel().draw(wide[::2, :200], draws) == _kernel().draw(wide[::2, :200].contiguous(), draws)


def test_a_draw_looks_at_the_row_alone() -> None:
    kernel = _kernel()
    logits: Tensor = torch.randn(8, 2500, generator=torch.Generator().manual_seed(3))
    draws = [_draw(i / 8, top_p=0.9, top_k=(0, 40)[i % 2]) for i in range(8)]

    together = kernel.draw(logits, draws)

    assert together == [_kernel().draw(logits[i : i + 1], draws[i : i + 1])[0] for i in range(8)]
