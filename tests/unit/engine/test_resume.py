"""A sequence that another worker began: it goes on as if it had been here from the start."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
from engine_builders import VOCABULARY, CountingRunner, make_engine, make_request

from actors.engine.engine import Engine, StepOutput
from cluster.errors import InvalidRequest
from cluster.types import FinishReason, GenerationRequest


def _run(engine: Engine, request: GenerationRequest) -> list[StepOutput]:
    engine.add(request)
    outputs: list[StepOutput] = []
    while engine.has_work:
        outputs += engine.step()
    return outputs


def _mixed(tokens: Sequence[int]) -> int:
    """A next token that depends on every token and comes back to earlier ones: penalties change the answer."""
    return sum((i + 1) * token for i, token in enumerate(tokens)) % 7 + 1


RULES: dict[str, dict[str, Any]] = {
    "greedy": {},
    "sampled": {"temperature": 1.0, "seed": 5, "ignore_eos": True},
    "min_tokens": {"min_tokens": 6},
    "presence": {"presence_penalty": 2.0, "ignore_eos": True},
    "frequency": {"frequency_penalty": 1.5, "temperature": 0.9, "seed": 3, "ignore_eos": True},
    "repetition": {"repetition_penalty": 50.0, "ignore_eos": True},
    "bad_words": {"bad_words": ((5, 4), (7,)), "ignore_eos": True},
    "logprobs": {"num_logprobs": 3},
    "stop token": {"stop_token_ids": (2,), "ignore_eos": True},
}


@pytest.mark.parametrize("rule", RULES)
def test_the_rest_is_what_an_unbroken_run_gives(rule: str) -> None:
    request = make_request("a", prompt=(3, 1, 4, 1, 5), max_tokens=9, choice=2, **RULES[rule])
    whole = _run(make_engine(CountingRunner(_mixed), eos=(6,)), request)
    emitted = [output.token_id for output in whole]

    for cut in range(1, len(whole)):
        resumed = replace(request, emitted_ids=tuple(emitted[:cut]), attempt=1)
        rest = _run(make_engine(CountingRunner(_mixed), eos=(6,)), resumed)
        assert [output.token_id for output in rest] == emitted[cut:], f"{rule} cut after {cut}"
        assert [output.logprob for output in rest] == [output.logprob for output in whole[cut:]]
        assert rest[-1].finish_reason is whole[-1].finish_reason


def test_emitted_tokens_are_computed_again_in_one_prefill() -> None:
    runner = CountingRunner()
    request = replace(make_request("a", prompt=(1, 2, 3), max_tokens=6), emitted_ids=(4, 5, 6))

    outputs = _run(make_engine(runner), request)

    assert runner.steps[0] == [("a", 6)]
    assert [output.token_id for output in outputs] == [7, 8, 9]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_prompt_is_scored_once_and_counted_once() -> None:
    request = replace(make_request("a", prompt=(1, 2, 3), num_prompt_logprobs=1), emitted_ids=(4,))
    engine = make_engine()
    _run(engine, replace(request, emitted_ids=()))
    prompt_tokens = engine.counters.prompt_tokens

    outputs = _run(engine, request)

    assert all(output.prompt_logprobs is None for output in outputs)
    assert [output.num_cached for output in outputs] == [0] * len(outputs), "of its own tokens nothing counts as cached"
    assert engine.counters.prompt_tokens == prompt_tokens == 3


def test_it_is_never_refused_and_goes_before_those_that_wait() -> None:
    engine = make_engine(max_running=1, max_queue=0)
    engine.add(make_request("first", prompt=(8,), max_tokens=2))

    engine.add(replace(make_request("resumed", prompt=(1,), max_tokens=3), emitted_ids=(2,)))

    order = [output.request_id for _ in range(4) for output in engine.step()]
    assert order == ["resumed", "resumed", "first", "first"]


def test_a_sequence_that_has_all_its_tokens_is_refused() -> None:
    engine = make_engine(max_model_len=VOCABULARY)
    with pytest.raises(InvalidRequest, match="2 tokens already"):
        engine.add(replace(make_request("a", max_tokens=2), emitted_ids=(4, 5)))
    assert not engine.has_work
