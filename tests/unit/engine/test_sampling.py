"""Sampling: exact filters, exact distributions, and noise that depends on its keys alone."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch import Tensor

from actors.engine.sampling import sample, uniform
from cluster.types import SamplingParams, TokenLogprob


def _params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1} | fields))


def _sample(
    logits: Tensor,
    params: Sequence[SamplingParams],
    keys: Sequence[tuple[int, int]],
    banned: Sequence[tuple[int, ...]],
) -> tuple[list[int], list[TokenLogprob | None]]:
    """`sample` without penalties."""
    return sample(logits, params, keys, banned, [None] * len(params))


def _draws(logits: Tensor, num: int, **fields: Any) -> list[int]:
    """`num` draws from one distribution, by the token index of one sequence."""
    rows = logits.expand(num, -1)
    tokens, _ = _sample(rows, [_params(**fields)] * num, [(0, i) for i in range(num)], [()] * num)
    return tokens


def _deviation(tokens: list[int], probs: Tensor) -> float:
    """Chi-square of the tokens against `probs`, as standard deviations (Wilson-Hilferty); about 0 +- 1 if they fit."""
    expected = probs * len(tokens)
    seen = torch.bincount(torch.tensor(tokens), minlength=len(probs)).double()
    kept = probs > 0
    assert not seen[~kept].any(), "a token of probability zero was drawn"
    freedom = int(kept.sum()) - 1
    if freedom == 0:
        return 0.0
    chi_square = float(((seen[kept] - expected[kept]) ** 2 / expected[kept]).sum())
    spread = 2 / (9 * freedom)
    return ((chi_square / freedom) ** (1 / 3) - (1 - spread)) / spread**0.5


def _filtered(logits: Tensor, *, temperature: float, top_k: int, top_p: float, min_p: float) -> Tensor:
    """By the definitions, one candidate at a time."""
    probs = torch.softmax(logits.double() / temperature, dim=-1).tolist()
    alive = [i for i, p in enumerate(probs) if p >= min_p * max(probs)]
    alive.sort(key=lambda i: (-probs[i], i))
    if top_k:
        alive = alive[:top_k]
    total, kept, mass = sum(probs[i] for i in alive), [], 0.0
    for i in alive:
        if mass >= top_p * total:
            break
        kept.append(i)
        mass += probs[i]
    out = torch.zeros(len(probs), dtype=torch.float64)
    for i in kept:
        out[i] = probs[i] / mass
    return out


def test_uniform_is_a_function_of_its_keys_in_the_unit_interval() -> None:
    values = [uniform(seed, choice, index) for seed in range(20) for choice in range(4) for index in range(50)]

    assert values == [uniform(s, c, i) for s in range(20) for c in range(4) for i in range(50)]
    assert len(set(values)) == len(values)
    assert all(0 <= value < 1 for value in values)


@pytest.mark.parametrize("varying", ["seed", "choice", "index"])
def test_uniform_is_even_along_each_key(varying: str) -> None:
    values = [uniform(**({"seed": 3, "choice": 0, "index": 7} | {varying: i})) for i in range(2000)]

    counts = torch.histc(torch.tensor(values, dtype=torch.float64), bins=20, min=0, max=1)
    assert float(((counts - 100) ** 2 / 100).sum() / 19) < 2.0
    following = torch.corrcoef(torch.tensor([values[:-1], values[1:]], dtype=torch.float64))
    assert abs(float(following[0, 1])) < 0.05


def test_uniform_takes_any_seed() -> None:
    assert all(0 <= uniform(seed, 0, 0) < 1 for seed in (0, -1, 2**63, 2**64, -(2**63), 10**30))


@settings(max_examples=20, deadline=None)
@given(logits=st.lists(st.floats(-20, 20, width=32), min_size=2, max_size=12), seed=st.integers(0, 99))
def test_temperature_zero_is_greedy_whatever_the_filters(logits: list[float], seed: int) -> None:
    row = torch.tensor([logits])

    tokens, _ = _sample(row, [_params(temperature=0.0, top_k=3, top_p=0.5, min_p=0.2, seed=seed)], [(0, 0)], [()])

    assert tokens == [int(row[0].argmax())]


def test_draws_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])

    tokens = _draws(logits, 600, temperature=0.7, seed=11)

    assert _deviation(tokens, torch.softmax(logits.double() / 0.7, dim=-1)) < 3.5


def test_draws_over_seeds_follow_the_softmax() -> None:
    logits = torch.tensor([2.0, 1.0, 0.5, 0.0, -1.0, -3.0])
    num = 600

    tokens, _ = _sample(logits.expand(num, -1), [_params(seed=s) for s in range(num)], [(0, 0)] * num, [()] * num)

    assert _deviation(tokens, torch.softmax(logits.double(), dim=-1)) < 3.5


@pytest.mark.parametrize(
    "filters",
    [
        {"top_k": 1},
        {"top_k": 3},
        {"top_k": 100},
        {"top_p": 0.5},
        {"top_p": 0.9},
        {"top_p": 1e-6},
        {"min_p": 0.2},
        {"min_p": 1.0},
        {"top_k": 4, "top_p": 0.8},
        {"top_k": 5, "top_p": 0.9, "min_p": 0.05},
    ],
    ids=str,
)
def test_filtered_draws_follow_the_filtered_distribution(filters: dict[str, Any]) -> None:
    logits = torch.tensor([0.3, 2.0, -0.5, 1.2, 0.9, -2.0, 1.9, 0.0])
    exact = _filtered(logits, temperature=0.9, **({"top_k": 0, "top_p": 1.0, "min_p": 0.0} | filters))

    tokens = _draws(logits, 500, temperature=0.9, seed=5, **filters)

    assert _deviation(tokens, exact) < 3.5


@settings(max_examples=30, deadline=None)
@given(
    logits=st.lists(st.floats(-6, 6, width=32), min_size=1, max_size=10, unique=True),
    top_k=st.integers(0, 12),
    top_p=st.floats(0.01, 1.0),
    min_p=st.floats(0.0, 1.0),
    temperature=st.floats(0.05, 5.0),
    index=st.integers(0, 10**6),
)
def test_no_draw_leaves_the_allowed_set(
    logits: list[float], top_k: int, top_p: float, min_p: float, temperature: float, index: int
) -> None:
    row = torch.tensor([logits])
    exact = _filtered(
        row[0], temperature=temperature, top_k=top_k, top_p=min(top_p + 1e-9, 1.0), min_p=min_p * 0.999999
    )

    tokens, _ = _sample(
        row, [_params(temperature=temperature, top_k=top_k, top_p=top_p, min_p=min_p)], [(0, index)], [()]
    )

    assert exact[tokens[0]] > 0


@pytest.mark.parametrize("temperature", [1e-8, 1e-30, 1e-310])
def test_tiny_temperature_is_greedy(temperature: float) -> None:
    assert set(_draws(torch.tensor([1.0, 3.0, 2.9999]), 20, temperature=temperature)) == {1}


def test_huge_temperature_is_even() -> None:
    tokens = _draws(torch.tensor([100.0, 0.0, -100.0, 5.0]), 500, temperature=1e6)

    assert _deviation(tokens, torch.full((4,), 0.25, dtype=torch.float64)) < 3.5


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_banned_tokens_are_never_chosen(temperature: float) -> None:
    logits = torch.tensor([[9.0, 8.0, 0.0, -9.0]]).expand(200, -1)

    tokens, _ = _sample(logits, [_params(temperature=temperature)] * 200, [(0, i) for i in range(200)], [(0, 1)] * 200)

    assert set(tokens) <= {2, 3}
    assert float(logits[0, 0]) == 9.0


def test_ban_concerns_its_row_alone() -> None:
    logits = torch.tensor([[9.0, 0.0], [9.0, 0.0]])

    tokens, _ = _sample(logits, [_params(temperature=0.0)] * 2, [(0, 0)] * 2, [(0,), ()])

    assert tokens == [1, 0]


def test_logprobs_are_those_of_the_unscaled_unbanned_logits() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, -1.0]])
    expected = torch.log_softmax(logits[0], dim=-1)

    _, (logprob,) = _sample(logits, [_params(temperature=0.0, num_logprobs=2)], [(0, 0)], [(1,)])

    assert logprob is not None
    assert logprob.token_id == 2
    assert logprob.logprob == pytest.approx(float(expected[2]), abs=1e-6)
    assert [token for token, _ in logprob.top] == [1, 2]
    assert [value for _, value in logprob.top] == pytest.approx(expected[[1, 2]].tolist(), abs=1e-6)


def test_zero_logprobs_gives_the_chosen_token_alone_and_more_than_the_vocabulary_gives_all() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0], [1.0, 3.0, 2.0]])
    params = [_params(temperature=0.0, num_logprobs=n) for n in (0, 20)]

    _, (none, everything) = _sample(logits, params, [(0, 0)] * 2, [()] * 2)

    assert none is not None and everything is not None
    assert none.top == ()
    assert len(everything.top) == 3
    assert sum(math.exp(value) for _, value in everything.top) == pytest.approx(1, abs=1e-6)


def test_a_row_is_drawn_the_same_in_any_company() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = 3 * torch.randn(16, 50, generator=generator)
    params = [
        _params(temperature=(0.0, 0.8, 1.3)[i % 3], top_p=(1.0, 0.9)[i % 2], top_k=(0, 10)[i % 2], seed=i)
        for i in range(16)
    ]
    keys = [(i % 2, i) for i in range(16)]
    together, _ = _sample(logits, params, keys, [()] * 16)

    alone = [_sample(logits[i : i + 1], [params[i]], [keys[i]], [()])[0][0] for i in range(16)]
    order = torch.randperm(16, generator=generator).tolist()
    shuffled, _ = _sample(logits[order], [params[i] for i in order], [keys[i] for i in order], [()] * 16)

    assert together == alone
    assert [shuffled[order.index(i)] for i in range(16)] == together


def test_bfloat16_logits_are_taken() -> None:
    tokens, _ = _sample(torch.tensor([[0.0, 5.0]], dtype=torch.bfloat16), [_params(temperature=0.0)], [(0, 0)], [()])

    assert tokens == [1]
