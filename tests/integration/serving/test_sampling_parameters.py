"""Penalties, prompt log-probabilities and several choices on the real model, against transformers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from identity import Case, Reference, engine_parts, generate, greedy
from model_builders import DEMO
from tokenizers import Tokenizer

from actors.engine.engine import Engine, StepOutput
from cluster.types import GenerationRequest, RequestId, SamplingParams

pytestmark = pytest.mark.slow

PROMPTS = ("What is 12 + 30?", "Once upon a time there was a king and the king", "def add(a, b):\n    return")
PENALTY = 1.3


@pytest.fixture(scope="module")
def engine() -> Iterator[Engine]:
    with engine_parts(DEMO) as parts:
        yield parts.engine


@pytest.fixture(scope="module")
def reference() -> Reference:
    return Reference(DEMO)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return [Case(text[:8], tuple(tokenizer.encode(text).ids), 24) for text in PROMPTS]


def _logits(reference: Reference, token_ids: list[int]) -> torch.Tensor:
    with torch.inference_mode():
        return reference.model(torch.tensor([token_ids])).logits[0].float()


def test_repetition_penalty_is_that_of_transformers(engine: Engine, reference: Reference, cases: list[Case]) -> None:
    params = [replace(greedy(case), repetition_penalty=PENALTY) for case in cases]

    answers = generate(engine, cases, params)

    changed = 0
    for case, outputs in zip(cases, answers, strict=True):
        with torch.inference_mode():
            expected = reference.model.generate(
                torch.tensor([case.prompt_ids]),
                attention_mask=torch.ones(1, len(case.prompt_ids), dtype=torch.int64),
                max_new_tokens=case.max_tokens,
                do_sample=False,
                repetition_penalty=PENALTY,
            )[0, len(case.prompt_ids) :].tolist()
        assert [output.token_id for output in outputs] == expected
        changed += expected != reference.tokens(case)
    assert changed, "the penalty makes no difference to these prompts: the test shows nothing"


def test_prompt_logprobs_are_those_of_transformers(engine: Engine, reference: Reference, cases: list[Case]) -> None:
    """Three chunks of a long prompt; half of it is in the prefix cache from the run before."""
    prompt = tuple(token for case in cases for token in case.prompt_ids) * 4
    long = Case("long", prompt[:150], 2)
    generate(engine, [replace(long, prompt_ids=long.prompt_ids[:80])], [greedy(long)])

    (outputs,) = generate(engine, [long], [replace(greedy(long), num_prompt_logprobs=2)])

    logprobs = torch.log_softmax(_logits(reference, list(long.prompt_ids)), dim=-1)
    scores = outputs[0].prompt_logprobs
    assert scores is not None
    assert [score.token_id for score in scores] == list(long.prompt_ids[1:])
    chosen = logprobs[:-1].gather(1, torch.tensor(long.prompt_ids[1:])[:, None])[:, 0]
    assert torch.allclose(torch.tensor([score.logprob for score in scores]), chosen, atol=1e-3)
    best = logprobs[:-1].max(dim=-1).values
    assert torch.allclose(torch.tensor([score.top[0][1] for score in scores]), best, atol=1e-3)
    assert outputs[0].num_cached == 0


def _run(engine: Engine, requests: list[GenerationRequest]) -> dict[str, list[StepOutput]]:
    outputs: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def test_choices_share_their_prompt_and_are_what_they_are_alone(engine: Engine, cases: list[Case]) -> None:
    prompt = cases[1].prompt_ids * 3
    params = SamplingParams(max_tokens=16, temperature=1.0, seed=5, frequency_penalty=0.3)
    requests = [
        GenerationRequest(request_id=RequestId(f"choice-{i}"), prompt_ids=prompt, sampling=params, choice=i)
        for i in range(3)
    ]

    together = _run(engine, requests)
    alone: dict[str, list[StepOutput]] = {}
    for request in requests:
        alone |= _run(engine, [request])

    def texts(outputs: dict[str, list[StepOutput]]) -> list[list[int]]:
        return [[output.token_id for output in outputs[request.request_id]] for request in requests]

    assert texts(together) == texts(alone)
    assert len({tuple(text) for text in texts(together)}) > 1
    num_shared = (len(prompt) - 1) // 16 * 16
    assert num_shared > 0
    assert [together[request.request_id][0].num_cached for request in requests[1:]] == [num_shared] * 2
