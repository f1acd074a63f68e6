"""A shard that cannot be read fails the requests that need it, with its name; the others never notice."""

from __future__ import annotations

import pytest
from identity import Case, demo_cases, engine_parts, generate_greedy, greedy
from model_builders import DEMO
from tokenizers import Tokenizer

from actors.engine.engine import Engine
from actors.experts.memory.disk import DiskLink
from cluster.errors import ExpertReadError
from cluster.types import ExpertId, GenerationRequest, RequestId

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return demo_cases(lambda text: tokenizer.encode(text).ids, prompts_per_domain=1)[:8]


def _answers(engine: Engine, cases: list[Case]) -> list[list[int] | str]:
    """Tokens of every case, or the message of the error that ended it; all run together."""
    for i, case in enumerate(cases):
        engine.add(
            GenerationRequest(request_id=RequestId(str(i)), prompt_ids=tuple(case.prompt_ids), sampling=greedy(case))
        )
    answers: dict[int, list[int] | str] = {i: [] for i in range(len(cases))}
    while engine.has_work:
        for output in engine.step():
            index = int(output.request_id)
            if output.error is not None:
                answers[index] = output.error.message
            else:
                tokens = answers[index]
                assert isinstance(tokens, list), "an answer after an error"
                tokens.append(output.token_id)
    return [answers[i] for i in range(len(cases))]


def test_only_requests_that_need_the_expert_fail_and_say_which_file(
    cases: list[Case], monkeypatch: pytest.MonkeyPatch
) -> None:
    with engine_parts(DEMO, cache="12.5%", max_running=16) as parts:
        used: list[set[ExpertId]] = []
        truth: list[list[int]] = []
        for case in cases:
            before = {layer: counts.sum(axis=0) for layer, counts in parts.recorder.counts.items()}
            truth += generate_greedy(parts.engine, [case], alone=True)
            parts.recorder.settle()
            used.append(
                {
                    ExpertId(layer, int(expert))
                    for layer, counts in parts.recorder.counts.items()
                    for expert in (counts.sum(axis=0) - before[layer]).nonzero()[0]
                }
            )
        half = len(cases) // 2
        broken = next(
            expert for expert in sorted(set().union(*used)) if 0 < sum(expert in needs for needs in used) <= half
        )
    copy_chunk = DiskLink.copy_chunk

    def unreadable(link: DiskLink, index: int, chunk: int, slot: int) -> int:
        if link._form.expert(index) == broken:
            raise ExpertReadError("shard-7.safetensors: reading 4096 bytes at 0 failed: [Errno 5] Input/output error")
        return copy_chunk(link, index, chunk, slot)

    monkeypatch.setattr(DiskLink, "copy_chunk", unreadable)
    with engine_parts(DEMO, cache="12.5%", max_running=16) as parts:
        answers = _answers(parts.engine, cases)

        assert parts.engine.batcher.blocks.num_used == 0
        for answer, needs, tokens in zip(answers, used, truth, strict=True):
            if broken in needs:
                assert isinstance(answer, str)
                assert "shard-7.safetensors" in answer
                assert f"expert {broken.expert} of layer {broken.layer}" in answer
            else:
                assert answer == tokens
        monkeypatch.setattr(DiskLink, "copy_chunk", copy_chunk)
        assert _answers(parts.engine, cases) == truth, "readable again: nothing is left of the failure"
