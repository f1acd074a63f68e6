"""A real engine goes on where another one stopped: the same tokens, greedy and sampled, in float32."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from identity import engine_parts
from model_builders import DEMO

from actors.engine.engine import Engine
from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.loadgen.prompts import BUNDLED_PROMPTS
from cluster.types import GenerationRequest, RequestId, SamplingParams

NUM_TOKENS = 32
KINDS: dict[str, dict[str, Any]] = {
    "greedy": {"temperature": 0.0},
    "sampled": {"temperature": 1.0, "top_p": 0.95, "seed": 11},
    "penalised": {"temperature": 0.8, "seed": 4, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
}


def _tokens(engine: Engine, requests: list[GenerationRequest]) -> list[list[int]]:
    tokens: dict[str, list[int]] = {request.request_id: [] for request in requests}
    for request in requests:
        engine.add(request)
    while engine.has_work:
        for output in engine.step():
            tokens[output.request_id].append(output.token_id)
    return list(tokens.values())


def test_the_rest_of_an_answer_is_the_same_from_another_worker() -> None:
    tokenizer = Tokenizer.load(DEMO)
    requests = [
        GenerationRequest(
            request_id=RequestId(f"{kind}-{i}"),
            prompt_ids=tuple(tokenizer.encode(text))[:30],
            sampling=SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True, **options),
        )
        for kind, options in KINDS.items()
        for i, text in enumerate(BUNDLED_PROMPTS[:2])
    ]
    with engine_parts(DEMO) as first:
        whole = _tokens(first.engine, requests)
    cuts = [1, 7, 16, 17, 25, NUM_TOKENS - 1]  # inside and at the ends of KV blocks
    resumed = [
        replace(request, emitted_ids=tuple(said[:cut]), attempt=1)
        for request, said, cut in zip(requests, whole, cuts, strict=True)
    ]
    with engine_parts(DEMO, cache="25%") as second:
        rest = _tokens(second.engine, resumed)

    assert rest == [said[cut:] for said, cut in zip(whole, cuts, strict=True)]
