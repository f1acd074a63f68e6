"""Weights that give NaN or infinity fail the requests that meet them, and nobody else, under every policy.

What was learned stays finite: scores, forecasts, statistics and policy state; and later requests are answered.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from damaged_checkpoints import poisoned
from identity import PAIRS, engine_parts, expert_hosts
from model_builders import build_checkpoint

from actors.engine.engine import Engine
from actors.engine.loaded_engine import LoadedEngine
from cluster.errors import CheckpointError, InvalidOutput, MoesaicError
from cluster.types import ExpertId, GenerationRequest, RequestId, SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

CACHE = "25%"
MAX_TOKENS = 4
PROMPTS = [tuple(int(i) for i in np.random.default_rng(seed).integers(3, 4000, 2)) for seed in range(12)]
Answer = list[int] | MoesaicError


@dataclass(frozen=True)
class Clean:
    """What every prompt's answer is, and the experts that it uses, with sound weights."""

    path: Path
    answers: list[list[int]]
    used: list[set[ExpertId]]


def _answers(engine: Engine, prompts: Sequence[tuple[int, ...]], *, temperature: float = 0.0) -> list[Answer]:
    """Tokens of every prompt, or the error that ended it; all run together."""
    for i, prompt in enumerate(prompts):
        sampling = SamplingParams(max_tokens=MAX_TOKENS, temperature=temperature, seed=i, ignore_eos=True)
        engine.add(GenerationRequest(request_id=RequestId(str(i)), prompt_ids=prompt, sampling=sampling))
    answers: list[Answer] = [[] for _ in prompts]
    while engine.has_work:
        for output in engine.step():
            index, answer = int(output.request_id), answers[int(output.request_id)]
            assert isinstance(answer, list), "an answer after an error"
            if output.error is not None:
                answers[index] = output.error
            else:
                answer.append(output.token_id)
    return answers


def _uses(parts: LoadedEngine) -> np.ndarray:
    parts.recorder.settle()
    return np.stack([counts.sum(axis=0) for counts in parts.recorder.counts.values()])


@pytest.fixture(scope="module")
def clean(tmp_path_factory: pytest.TempPathFactory) -> Clean:
    path = build_checkpoint(tmp_path_factory.mktemp("clean"), "qwen3_moe", num_experts=32)
    answers: list[list[int]] = []
    used: list[set[ExpertId]] = []
    with engine_parts(path) as parts:
        for prompt in PROMPTS:
            before = _uses(parts)
            (answer,) = _answers(parts.engine, [prompt])
            assert isinstance(answer, list)
            answers.append(answer)
            used.append({ExpertId(*map(int, at)) for at in np.argwhere(_uses(parts) > before)})
    return Clean(path, answers, used)


def _copy(clean: Clean, directory: Path) -> Path:
    return Path(shutil.copytree(clean.path, directory))


def _victim(clean: Clean, layer: int) -> ExpertId:
    """An expert of the layer that a few prompts use."""
    return next(
        ExpertId(layer, expert)
        for expert in range(32)
        if 0 < sum(ExpertId(layer, expert) in u for u in clean.used) <= 5
    )


def _assert_only(clean: Clean, answers: Sequence[Answer], is_bad: Sequence[bool], reason: str) -> None:
    assert any(is_bad) and not all(is_bad)
    for answer, truth, bad in zip(answers, clean.answers, is_bad, strict=True):
        if bad:
            assert isinstance(answer, InvalidOutput), answer
            assert reason in answer.message
        else:
            assert answer == truth


def _assert_finite(parts: LoadedEngine) -> None:
    """Nobody has learned anything that is no number."""
    parts.recorder.settle()
    assert np.isfinite(parts.recorder.statistics.values).all()
    assert parts.engine.batcher.blocks.num_used == 0
    if parts.policy_runner is None:
        return
    learned = parts.policy_runner.ask(
        lambda: {name: part.to_arrays() for name, part in parts.policy_runner.policies.learned.items()},  # type: ignore[union-attr]
        10,
    )
    assert parts.policy_runner.problem is None
    assert parts.policy_runner.num_unsound == 0
    assert all(np.isfinite(array).all() for arrays in learned.values() for array in arrays.values())
    assert np.isfinite(parts.policy_runner.policies.scorer.scores()).all()


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=["nan", "inf"])
@pytest.mark.parametrize(("eviction", "prediction"), PAIRS)
def test_an_embedding_that_is_not_finite_fails_the_prompts_that_have_its_token(
    clean: Clean, tmp_path: Path, eviction: str, prediction: str, value: float
) -> None:
    token = PROMPTS[3][1]
    is_bad = [token in (*prompt, *answer[:-1]) for prompt, answer in zip(PROMPTS, clean.answers, strict=True)]
    path = poisoned(_copy(clean, tmp_path / "model"), "model.embed_tokens.weight", value, row=token)
    with engine_parts(path, cache=CACHE, experts={"eviction": eviction, "prediction": prediction}) as parts:
        for _ in range(3):
            answers = _answers(parts.engine, PROMPTS)
            _assert_only(clean, answers, is_bad, f"the embedding of token {token}")
        again = _answers(parts.engine, [prompt for prompt, bad in zip(PROMPTS, is_bad, strict=True) if not bad])

        assert again == [answer for answer, bad in zip(clean.answers, is_bad, strict=True) if not bad]
        _assert_finite(parts)


@pytest.mark.parametrize("layer", [0, 1, 2])
@pytest.mark.parametrize(("eviction", "prediction"), PAIRS)
def test_an_expert_that_is_not_finite_fails_the_requests_that_use_it(
    clean: Clean, tmp_path: Path, eviction: str, prediction: str, layer: int
) -> None:
    victim = _victim(clean, layer)
    is_bad = [victim in used for used in clean.used]
    tensor = f"model.layers.{layer}.mlp.experts.{victim.expert}.down_proj.weight"
    path = poisoned(_copy(clean, tmp_path / "model"), tensor, math.nan if layer else math.inf)
    with engine_parts(path, cache=CACHE, experts={"eviction": eviction, "prediction": prediction}) as parts:
        for _ in range(3):
            answers = _answers(parts.engine, PROMPTS)
            _assert_only(clean, answers, is_bad, f"from expert {victim.expert} of layer {layer} on")
            assert {a.expert for a in answers if isinstance(a, InvalidOutput)} == {tuple(victim)}
        _assert_finite(parts)


@pytest.mark.parametrize("layer", [1, 2])
def test_an_expert_of_a_host_that_is_not_finite_is_named_too(clean: Clean, tmp_path: Path, layer: int) -> None:
    victim = _victim(clean, layer)
    is_bad = [victim in used for used in clean.used]
    tensor = f"model.layers.{layer}.mlp.experts.{victim.expert}.down_proj.weight"
    path = poisoned(_copy(clean, tmp_path / "model"), tensor, math.nan)
    with expert_hosts(path, 2) as hosts, engine_parts(path, cache="0%", hosts=hosts) as parts:
        for _ in range(2):
            answers = _answers(parts.engine, PROMPTS)
            _assert_only(clean, answers, is_bad, f"from expert {victim.expert} of layer {layer} on")
        _assert_finite(parts)


def test_what_broke_off_is_counted_once(clean: Clean, tmp_path: Path) -> None:
    """Statistics are those of the requests that went on, as if nobody else had been there; prompts that fail at the
    first gate count nothing."""
    token = PROMPTS[3][1]
    path = poisoned(_copy(clean, tmp_path / "model"), "model.embed_tokens.weight", math.nan, row=token)
    good = [prompt for prompt in PROMPTS if token not in prompt]
    counts: list[np.ndarray] = []
    for prompts in (good, [*good, PROMPTS[3]]):
        with engine_parts(path, cache=CACHE) as parts:
            _answers(parts.engine, prompts)
            counts.append(_uses(parts))

    assert counts[0].tolist() == counts[1].tolist()


@pytest.mark.parametrize("temperature", [0.0, 1.0], ids=["greedy", "drawn"])
def test_logits_that_are_not_finite_give_no_token(clean: Clean, tmp_path: Path, temperature: float) -> None:
    """Neither greedy nor drawn: token 0 is an answer, and this is none. After the last layer no gate looks."""
    victim = _victim(clean, 2)
    tensor = f"model.layers.2.mlp.experts.{victim.expert}.down_proj.weight"
    path = poisoned(_copy(clean, tmp_path / "model"), tensor, math.nan)
    with engine_parts(path, cache=CACHE) as parts:
        answers = _answers(parts.engine, PROMPTS, temperature=temperature)

        failed = [answer for answer in answers if isinstance(answer, InvalidOutput)]
        assert 0 < len(failed) < len(answers)
        assert all(f"expert {victim.expert} of layer 2" in error.message for error in failed)


def test_a_checkpoint_whose_every_answer_would_fail_is_refused(clean: Clean, tmp_path: Path) -> None:
    path = poisoned(_copy(clean, tmp_path / "model"), "model.norm.weight", math.nan)

    with pytest.raises(CheckpointError, match="not finite"), engine_parts(path, cache=CACHE):
        pass


def test_pages_of_a_request_that_failed_are_nobodys_prefix(clean: Clean, tmp_path: Path) -> None:
    """Its prompt was sound, and in the cache; what it said later was not."""
    prompt = tuple(int(i) for i in np.random.default_rng(99).integers(3, 4000, 40))
    with engine_parts(clean.path, cache=CACHE) as parts:
        (answer,) = _answers(parts.engine, [prompt])
    assert isinstance(answer, list)
    token = next(t for t in answer[:-1] if t not in prompt)
    path = poisoned(_copy(clean, tmp_path / "model"), "model.embed_tokens.weight", math.nan, row=token)
    with engine_parts(path, cache=CACHE) as parts:
        for _ in range(2):
            (failed,) = _answers(parts.engine, [prompt])

            assert isinstance(failed, InvalidOutput)
            assert parts.engine.counters.cached_prompt_tokens == 0
