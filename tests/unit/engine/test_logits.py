"""What parameters do to logits, against their definitions one token at a time; and scores of given tokens."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from actors.engine.logits import score_tokens, shape_logits
from actors.engine.sampling import sample
from actors.engine.token_counts import TokenCounts
from cluster.types import SamplingParams

VOCABULARY = 12


def _params(**fields: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 1} | fields))


def _counts(params: SamplingParams, prompt: list[int], generated: list[int]) -> TokenCounts | None:
    if not params.has_penalties:
        return None
    counts = TokenCounts(prompt if params.repetition_penalty != 1 else ())
    counts.add(generated)
    return counts


def _by_definition(logits: list[float], p: SamplingParams, prompt: list[int], generated: list[int]) -> list[float]:
    """vLLM's and OpenAI's rules, token by token."""
    shaped = []
    for token, logit in enumerate(logits):
        if p.allowed_token_ids and token not in p.allowed_token_ids:
            logit = float("-inf")
        logit += dict(p.logit_bias).get(token, 0.0)
        if token in prompt or token in generated:
            logit = logit / p.repetition_penalty if logit > 0 else logit * p.repetition_penalty
        logit -= p.frequency_penalty * generated.count(token)
        logit -= p.presence_penalty * (token in generated)
        shaped.append(logit)
    return shaped


def _random_row(rng: random.Random) -> tuple[list[float], SamplingParams, list[int], list[int]]:
    """Logits, parameters of which each may be neutral, prompt and answer."""
    tokens = range(VOCABULARY)
    params = _params(
        presence_penalty=rng.choice((0.0, 0.7, -1.5)),
        frequency_penalty=rng.choice((0.0, 0.4, 2.0)),
        repetition_penalty=rng.choice((1.0, 1.3, 0.5)),
        logit_bias=tuple((token, rng.uniform(-100, 100)) for token in rng.sample(tokens, rng.randrange(4))),
        allowed_token_ids=tuple(rng.sample(tokens, rng.choice((0, 0, 4)))),
    )
    logits = [rng.uniform(-20, 20) for _ in tokens]
    return logits, params, rng.choices(tokens, k=rng.randrange(7)), rng.choices(tokens, k=rng.randrange(9))


@pytest.mark.parametrize("seed", range(5))
def test_every_row_is_shaped_as_defined_whatever_the_others_ask(seed: int) -> None:
    rng = random.Random(seed)
    rows = [_random_row(rng) for _ in range(20)]
    logits = torch.tensor([row[0] for row in rows])
    before = logits.clone()
    params = [row[1] for row in rows]

    shaped = shape_logits(logits, params, [()] * len(rows), [_counts(p, prompt, out) for _, p, prompt, out in rows])

    expected = torch.tensor([_by_definition(row, p, prompt, out) for row, p, prompt, out in rows])
    assert torch.allclose(shaped, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(logits, before)


def test_nothing_is_copied_when_nobody_asks() -> None:
    logits = torch.randn(3, VOCABULARY)

    assert shape_logits(logits, [_params()] * 3, [()] * 3, [None] * 3) is logits


def test_presence_and_frequency_ignore_the_prompt() -> None:
    logits = torch.ones(1, VOCABULARY)
    params = _params(presence_penalty=1.0, frequency_penalty=0.5)

    shaped = shape_logits(logits, [params], [()], [_counts(params, [1, 1, 2], [2, 2, 3])])

    assert shaped[0, :5].tolist() == [1.0, 1.0, -1.0, -0.5, 1.0]


def test_repetition_divides_positive_and_multiplies_negative_logits_of_prompt_and_answer_once() -> None:
    logits = torch.tensor([[4.0, -4.0, 4.0, -4.0, 4.0]])
    params = _params(repetition_penalty=2.0)

    shaped = shape_logits(logits, [params], [()], [_counts(params, [0, 0, 1], [2, 3, 3])])

    assert shaped[0].tolist() == [2.0, -8.0, 2.0, -8.0, 4.0]


def test_bias_comes_before_the_repetition_penalty() -> None:
    params = _params(repetition_penalty=2.0, logit_bias=((0, 3.0),))

    shaped = shape_logits(torch.tensor([[-1.0, 0.0]]), [params], [()], [_counts(params, [0], [])])

    assert shaped[0].tolist() == [1.0, 0.0]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_draws_follow_the_shaped_logits_and_logprobs_the_models(temperature: float) -> None:
    logits = torch.tensor([[5.0, 4.0, 0.0, -5.0]]).repeat(40, 1)
    params = _params(temperature=temperature, num_logprobs=1, logit_bias=((0, -100.0), (1, -100.0)), top_k=1)

    tokens, logprobs = sample(logits, [params] * 40, [(0, i) for i in range(40)], [()] * 40, [None] * 40)

    assert set(tokens) == {2}
    raw = torch.log_softmax(logits[0], dim=-1)
    assert all(entry is not None and entry.logprob == pytest.approx(float(raw[2]), abs=1e-6) for entry in logprobs)
    assert all(entry is not None and [token for token, _ in entry.top] == [0] for entry in logprobs)


def test_allowed_tokens_alone_are_drawn_unless_banned() -> None:
    params = _params(allowed_token_ids=(3, 7), temperature=2.0)
    logits = torch.zeros(60, VOCABULARY)

    free, _ = sample(logits, [params] * 60, [(0, i) for i in range(60)], [()] * 60, [None] * 60)
    banned, _ = sample(logits, [params] * 60, [(0, i) for i in range(60)], [(7,)] * 60, [None] * 60)

    assert set(free) == {3, 7}
    assert set(banned) == {3}


def test_scores_are_logprobs_and_ranks_of_the_given_tokens() -> None:
    logits = torch.randn(4, VOCABULARY, generator=torch.Generator().manual_seed(2))
    given_ids = [0, 5, int(logits[2].argmax()), int(logits[3].argmin())]

    scores = score_tokens(logits, given_ids, 3)

    for row, (score, token) in enumerate(zip(scores, given_ids, strict=True)):
        logprobs = torch.log_softmax(logits[row].double(), dim=-1)
        ranked = logprobs.argsort(descending=True).tolist()
        assert (score.token_id, score.rank) == (token, ranked.index(token) + 1)
        assert score.logprob == pytest.approx(float(logprobs[token]), abs=1e-5)
        assert [top for top, _ in score.top] == ranked[:3]


def test_draws_of_requests_without_these_parameters_stay_as_they_were() -> None:
    """Tokens of the release that had none of them: seeds that people noted must go on giving the same text."""
    size, columns = 12, torch.arange(40, dtype=torch.float64)
    rows = torch.arange(size, dtype=torch.float64)[:, None]
    logits = (5 * torch.sin(1.7 * rows + 0.31 * columns * columns)).float()
    params = [
        _params(
            temperature=(0.0, 0.7, 1.0, 1.4)[i % 4],
            top_k=(0, 5, 0)[i % 3],
            top_p=(1.0, 0.9)[i % 2],
            min_p=(0.0, 0.0, 0.1)[i % 3],
            seed=100 + i,
        )
        for i in range(size)
    ]
    banned = [(i,) if i % 5 == 0 else () for i in range(size)]

    tokens, _ = sample(logits, params, [(i % 3, 7 * i) for i in range(size)], banned, [None] * size)

    assert tokens == [38, 18, 16, 35, 8, 36, 16, 30, 23, 4, 16, 38]
