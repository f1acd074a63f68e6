"""The engine answers exactly as transformers does, whatever the cache size, the batch and the preemptions."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from identity import (
    Case,
    Reference,
    assert_identical,
    demo_cases,
    engine_parts,
    generate,
    generate_greedy,
    greedy,
    random_cases,
)
from model_builders import DEMO, FAMILIES, NUM_EXPERTS, TOP_K, build_checkpoint
from same_draws import assert_same_draws
from tokenizers import Tokenizer

from actors.engine.batcher import ScheduledRows
from actors.engine.model_runner import ModelRunner
from actors.engine.sequence import Sequence
from actors.experts.dispatch import Dispatcher
from actors.gates.work import ExpertWork
from actors.kernels.native import load_native
from actors.model.checkpoint import load_model
from cluster.model.info import load_model_info
from cluster.types import GenerationRequest, RequestId, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

DEMO_SMALLEST = str(4 * 102400)  # four experts: one token's top-k in one layer
RANDOM_SMALLEST = f"{100 * TOP_K / (3 * NUM_EXPERTS) + 0.01:.2f}%"


@pytest.fixture(scope="module")
def demo_reference() -> Reference:
    return Reference(DEMO)


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    tokenizer = Tokenizer.from_file(str(DEMO / "tokenizer.json"))
    return demo_cases(lambda text: tokenizer.encode(text).ids)


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def random_checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_checkpoint(tmp_path_factory.mktemp(request.param), request.param)


@pytest.fixture(scope="module")
def random_reference(random_checkpoint: Path) -> Reference:
    return Reference(random_checkpoint)


@pytest.mark.parametrize("cache", ["100%", "25%", DEMO_SMALLEST])
def test_demo_alone_answers_as_transformers(
    demo: Path, demo_reference: Reference, cases: list[Case], cache: str
) -> None:
    with engine_parts(demo, cache=cache) as parts:
        answers = generate_greedy(parts.engine, cases, alone=True)

    assert_identical(demo_reference, cases, answers)


@pytest.mark.parametrize("cache", ["100%", "25%", DEMO_SMALLEST])
def test_demo_under_16_requests_with_preemption_answers_as_transformers(
    demo: Path, demo_reference: Reference, cases: list[Case], cache: str
) -> None:
    with engine_parts(demo, cache=cache, kv_blocks=60, max_running=16) as parts:
        answers = generate_greedy(parts.engine, cases, alone=False)

        assert parts.engine.batcher.num_preemptions > 0
        assert parts.engine.batcher.blocks.num_used == 0
    assert_identical(demo_reference, cases, answers)


@pytest.mark.parametrize("alone", [True, False], ids=["alone", "concurrent"])
def test_random_family_at_the_smallest_cache_answers_as_transformers(
    random_checkpoint: Path, random_reference: Reference, alone: bool
) -> None:
    info = load_model_info(str(random_checkpoint))
    prompts = random_cases(6 if alone else 16, vocab_size=info.vocab_size)
    with engine_parts(random_checkpoint, cache=RANDOM_SMALLEST, kv_blocks=26, max_running=16) as parts:
        answers = generate_greedy(parts.engine, prompts, alone=alone)

        assert parts.store.num_slots == TOP_K
        assert (parts.engine.batcher.num_preemptions > 0) is not alone
    assert_identical(random_reference, prompts, answers)


@pytest.mark.parametrize(
    "storage",
    [{"fused": True}, {"dtype": torch.bfloat16}, {"max_shard_size": "200KB"}, {"tie_word_embeddings": True}],
    ids=["fused", "stored-bfloat16", "sharded", "tied"],
)
@pytest.mark.parametrize("family", ["qwen3_moe", "mixtral"])
def test_answers_do_not_depend_on_how_the_checkpoint_is_stored(
    tmp_path: Path, family: str, storage: dict[str, Any]
) -> None:
    path = build_checkpoint(tmp_path, family, **storage)
    prompts = random_cases(3, vocab_size=load_model_info(str(path)).vocab_size)
    with engine_parts(path, cache=RANDOM_SMALLEST) as parts:
        answers = generate_greedy(parts.engine, prompts, alone=False)

    assert_identical(Reference(path), prompts, answers)


@pytest.mark.parametrize(
    "filters",
    [{}, {"top_p": 0.9}, {"top_k": 20}, {"min_p": 0.05}, {"top_p": 0.9, "top_k": 50, "min_p": 0.02}],
    ids=lambda filters: "+".join(filters) or "plain",
)
def test_same_seed_gives_same_tokens_alone_and_in_a_batch_of_16(
    demo: Path, cases: list[Case], filters: dict[str, float]
) -> None:
    batch = cases[:16]
    params = [
        SamplingParams(max_tokens=16, temperature=0.8, seed=i, **filters)  # type: ignore[arg-type]
        for i in range(len(batch))
    ]
    with engine_parts(demo) as parts:
        alone = [generate(parts.engine, [case], [p])[0] for case, p in zip(batch[:4], params[:4], strict=True)]
    with engine_parts(demo, max_running=16) as parts:
        together = generate(parts.engine, batch, params)

    assert [[o.token_id for o in answer] for answer in together[:4]] == [[o.token_id for o in a] for a in alone]


def test_sampled_tokens_survive_preemption(demo: Path, cases: list[Case], demo_reference: Reference) -> None:
    batch = cases[:16]
    params = [SamplingParams(max_tokens=16, temperature=0.8, seed=i) for i in range(len(batch))]
    with engine_parts(demo) as parts:
        plenty = generate(parts.engine, batch, params)
        assert parts.engine.batcher.num_preemptions == 0
    with engine_parts(demo, kv_blocks=60) as parts:
        scarce = generate(parts.engine, batch, params)
        assert parts.engine.batcher.num_preemptions > 0

    ids = [[[o.token_id for o in answer] for answer in answers] for answers in (scarce, plenty)]
    assert_same_draws(demo_reference, batch, params, *ids)


def test_repeated_prompt_reuses_its_prefix_and_gives_the_same_tokens(demo: Path, cases: list[Case]) -> None:
    case = max(cases, key=lambda c: len(c.prompt_ids))
    with engine_parts(demo) as parts:
        first = generate(parts.engine, [case], [greedy(case)])[0]
        second = generate(parts.engine, [case], [greedy(case)])[0]

        assert parts.engine.counters.cached_prompt_tokens == second[0].num_cached
    assert first[0].num_cached == 0
    assert second[0].num_cached == (len(case.prompt_ids) - 1) // 16 * 16
    assert [o.token_id for o in second] == [o.token_id for o in first]


def test_preempted_sequence_reports_no_more_cached_tokens_than_at_its_start(demo: Path, cases: list[Case]) -> None:
    with engine_parts(demo, kv_blocks=60) as parts:
        answers = generate(parts.engine, cases[:16], [greedy(case, max_tokens=16) for case in cases[:16]])

        assert parts.engine.batcher.num_preemptions > 0
    assert [answer[-1].num_cached for answer in answers] == [answer[0].num_cached for answer in answers]


def test_chunked_prefill_gives_the_same_tokens(demo: Path, demo_reference: Reference, cases: list[Case]) -> None:
    some = cases[:6]
    with engine_parts(demo, max_batch_tokens=16) as parts:
        answers = generate_greedy(parts.engine, some, alone=False)

    assert_identical(demo_reference, some, answers)


class RecordingDispatcher:
    """A dispatcher that writes down who asked for which layer, in order."""

    def __init__(self, inner: Dispatcher) -> None:
        self.inner = inner
        self.recorder = inner.recorder
        self.calls: list[tuple[int, int]] = []

    def start(self, work: ExpertWork, num_rows: int, num_decode: int) -> Callable[[], torch.Tensor]:
        self.calls.append((num_rows, work.layer))
        return self.inner.start(work, num_rows, num_decode)

    def close(self) -> None:
        self.inner.close()


def _rows(case_ids: list[int], first_block: int) -> ScheduledRows:
    request = GenerationRequest(
        request_id=RequestId(str(first_block)), prompt_ids=tuple(case_ids), sampling=SamplingParams(max_tokens=1)
    )
    sequence = Sequence(request)
    sequence.add_blocks(list(range(first_block, first_block + 4)), 16)
    return ScheduledRows(sequence, len(case_ids))


def _interleave_runner(path: Path, dispatcher: Dispatcher) -> ModelRunner:
    loaded = load_model(load_model_info(str(path)), "float32")
    return ModelRunner(loaded, dispatcher, load_native(), num_blocks=16, block_size=16)


def test_micro_batches_interleave_layer_by_layer_and_give_the_same_logits(random_checkpoint: Path) -> None:
    micro_batches = [[_rows(list(range(10, 40)), 1)], [_rows(list(range(50, 60)), 5), _rows([70], 9)]]
    with engine_parts(random_checkpoint, cache=RANDOM_SMALLEST) as parts:
        recorder = RecordingDispatcher(parts.dispatcher)
        runner = _interleave_runner(random_checkpoint, recorder)
        alone = [runner.execute(rows) for rows in micro_batches]
        recorder.calls.clear()

        together = runner.execute_interleaved(micro_batches)

    layers = sorted({layer for _, layer in recorder.calls})
    assert len(layers) == 3
    assert recorder.calls == [(rows, layer) for layer in layers for rows in (30, 11)]
    for expected, got in zip(alone, together, strict=True):
        assert torch.equal(expected, got)


def test_interleaved_forwards_leave_torch_as_they_found_it(random_checkpoint: Path) -> None:
    with engine_parts(random_checkpoint, cache=RANDOM_SMALLEST) as parts:
        runner = ModelRunner(
            load_model(load_model_info(str(random_checkpoint)), "float32"),
            parts.dispatcher,
            load_native(),
            num_blocks=16,
            block_size=16,
            native_rows=64,
        )

        runner.execute_interleaved([[_rows([1, 2, 3], 1)], [_rows([4, 5], 5)]])

    assert not torch.is_inference_mode_enabled()
    assert torch._C._get_mkldnn_enabled()


@pytest.mark.parametrize("cache", ["100%", DEMO_SMALLEST])
def test_bfloat16_logprobs_stay_close_to_transformers(demo: Path, cases: list[Case], cache: str) -> None:
    """Teacher-forced by construction: every prompt is scored for its next token only."""
    from transformers import AutoModelForCausalLM

    reference = AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16).eval()
    some = cases[:10]
    with engine_parts(demo, cache=cache, dtype="bfloat16") as parts:
        vocabulary = load_model_info(str(DEMO)).vocab_size
        params = [SamplingParams(max_tokens=1, temperature=0.0, num_logprobs=vocabulary) for _ in some]
        answers = generate(parts.engine, some, params)

    for case, answer in zip(some, answers, strict=True):
        with torch.inference_mode():
            logits = reference(torch.tensor([case.prompt_ids])).logits[0, -1].float()
        logprob = answer[0].logprob
        assert logprob is not None
        ours = torch.empty(vocabulary)
        for token, value in logprob.top:
            ours[token] = value
        expected = torch.log_softmax(logits, dim=-1)
        cosine = torch.nn.functional.cosine_similarity(ours - ours.mean(), expected - expected.mean(), dim=0)
        assert cosine > 0.99, case.name
