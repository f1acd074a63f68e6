"""Traces recorded of whole engines: what the gates said does not depend on who shared the step."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from identity import engine_parts
from model_builders import NUM_EXPERTS, TOP_K, build_checkpoint

from actors.engine.trace_recorder import record_trace
from cluster.model.info import load_model_info
from cluster.policies.trace import GateTrace, TracedRequest
from cluster.types import SamplingParams

pytestmark = pytest.mark.slow

PROMPTS = [(5, 6, 7, 8, 9), (11,), (20, 21, 22), (5, 6, 30, 31, 32, 33, 34)]
NUM_TOKENS = 6


def _record(path: Path, num_running: int, **attention: int) -> GateTrace:
    requests = [
        TracedRequest(request_id=f"r{i}", domain="d", source="s", prompt_ids=ids) for i, ids in enumerate(PROMPTS)
    ]
    sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
    with engine_parts(path, **attention) as built:
        runner = built.engine.runner
        trace = record_trace(built, load_model_info(str(path)), requests, sampling, num_running=num_running)
        assert built.engine.runner is runner
    return trace


@pytest.mark.parametrize("family", ["qwen3_moe", "deepseek_v3"])
def test_rows_do_not_depend_on_the_batch(family: str, tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / family, family)

    alone, together = _record(path, 1), _record(path, 4, max_batch_tokens=8)

    assert alone.model == together.model and alone.model.num_experts == NUM_EXPERTS and alone.model.top_k == TOP_K
    for i, prompt in enumerate(PROMPTS):
        first, second = alone.rows_of(i), together.rows_of(i)
        assert tuple(first.tokens[: len(prompt)]) == prompt
        assert first.is_decode.tolist() == [False] * len(prompt) + [True] * (NUM_TOKENS - 1)
        np.testing.assert_array_equal(first.positions, np.arange(len(prompt) + NUM_TOKENS - 1))
        np.testing.assert_array_equal(first.tokens, second.tokens)
        np.testing.assert_array_equal(first.positions, second.positions)
        np.testing.assert_array_equal(first.chosen, second.chosen)
        np.testing.assert_allclose(first.probs, second.probs, atol=2e-3)
        np.testing.assert_allclose(first.ahead, second.ahead, atol=2e-3)
        np.testing.assert_allclose(first.probs.sum(axis=2, dtype=np.float32), 1, atol=1e-2)


def test_choices_are_those_the_expert_memory_was_asked_for(tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path / "m", "qwen3_moe")
    request = TracedRequest(request_id="r", domain="", source="", prompt_ids=PROMPTS[0])

    with engine_parts(path) as built:
        sampling = SamplingParams(max_tokens=NUM_TOKENS, temperature=0.0, ignore_eos=True)
        trace = record_trace(built, load_model_info(str(path)), [request], sampling)
        counted = built.recorder.counts

    for row, layer in enumerate(trace.model.layers):
        of_layer = trace.chosen[:, row]
        expected = [
            np.bincount(of_layer[mask].ravel(), minlength=NUM_EXPERTS) for mask in (~trace.is_decode, trace.is_decode)
        ]
        np.testing.assert_array_equal(counted[layer], expected)
