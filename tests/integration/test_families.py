"""Families beyond the ones promised: those that pass the shorter proof, and those refused by name.

The longer proof, with preemption at the smallest cache, is in test_identity.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from identity import Reference, assert_identical, engine_parts, generate, generate_greedy, kv_block_bytes, random_cases
from model_builders import FAMILIES, build_checkpoint
from other_families import OTHER_FAMILIES
from transformers import AutoConfig, masking_utils
from transformers.models.mixtral import modeling_mixtral

from actors.engine.attention_check import AttentionCheck
from actors.kernels.native import load_native
from actors.model.checkpoint import LoadedModel, load_model
from cluster.errors import CheckpointError
from cluster.model.info import load_model_info
from cluster.model.kv_budget import values_per_token
from cluster.types import SamplingParams

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]


def _assert_served_exactly(path: Path, *, num_cases: int = 3) -> None:
    cases = random_cases(num_cases, vocab_size=load_model_info(str(path)).vocab_size, max_tokens=8)
    with engine_parts(path, cache="40%", max_batch_tokens=48) as parts:
        answers = generate_greedy(parts.engine, cases, alone=False)

    assert_identical(Reference(path), cases, answers)


@pytest.mark.parametrize("family", sorted(OTHER_FAMILIES))
def test_other_family_answers_as_transformers(tmp_path: Path, family: str) -> None:
    _assert_served_exactly(build_checkpoint(tmp_path, family))


@pytest.mark.parametrize("family", ["deepseek_v2", "gpt_oss"])
def test_without_compiled_kernels_latents_and_sinks_answer_as_transformers(
    tmp_path: Path, family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("actors.attention.build.load_native", lambda **_: None)

    _assert_served_exactly(build_checkpoint(tmp_path, family), num_cases=2)


def test_queries_without_compression_answer_as_transformers(tmp_path: Path) -> None:
    _assert_served_exactly(build_checkpoint(tmp_path, "deepseek_v2", q_lora_rank=None), num_cases=2)


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_bfloat16_logprobs_of_latents_and_sinks_stay_close_to_float32(tmp_path: Path, family: str) -> None:
    path = build_checkpoint(tmp_path, family, initializer_range=0.05)
    vocabulary = load_model_info(str(path)).vocab_size
    case = random_cases(1, vocab_size=vocabulary)[0]
    params = SamplingParams(max_tokens=4, temperature=0.0, num_logprobs=vocabulary)
    with engine_parts(path, dtype="bfloat16") as parts:
        answer = generate(parts.engine, [case], [params])[0]

    reference = Reference(path).model
    for i, output in enumerate(answer):
        ids = [*case.prompt_ids, *(o.token_id for o in answer[:i])]
        with torch.inference_mode():
            expected = torch.log_softmax(reference(torch.tensor([ids])).logits[0, -1], dim=-1)
        assert output.logprob is not None
        ours = torch.empty(vocabulary)
        for token, value in output.logprob.top:
            ours[token] = value
        cosine = torch.nn.functional.cosine_similarity(ours - ours.mean(), expected - expected.mean(), dim=0)
        assert cosine > 0.98, i


def test_latents_stay_latent_in_the_kv_budget(tmp_path: Path) -> None:
    path = build_checkpoint(tmp_path, "deepseek_v3")
    config = load_model_info(str(path)).config
    width = config["kv_lora_rank"] + config["qk_rope_head_dim"]

    attention = load_model(load_model_info(str(path)), "float32").attention
    with engine_parts(path, kv_blocks=40) as parts:
        num_blocks = parts.engine.batcher.blocks.num_blocks

    assert [layer.values_per_token for layer in attention] == [width] * 4
    assert kv_block_bytes(config, dtype="float32") == 4 * 4 * 16 * width
    assert num_blocks == 40


@pytest.mark.parametrize(
    ("family", "fields", "reason"),
    [
        ("deepseek_v32", {}, "'indexed_attention' (linear or sparse attention)"),
        ("deepseek_v4", {}, "(linear or sparse attention)"),
        ("glm_moe_dsa", {}, "'indexed_attention' (linear or sparse attention)"),
        ("granitemoehybrid", {"layer_types": ["mamba", "attention"] * 16}, "(linear or sparse attention)"),
        ("jamba", {}, "'linear_attention' (linear or sparse attention)"),
        ("lfm2_moe", {"layer_types": ["conv", "full_attention"] * 16}, "'conv' (linear or sparse attention)"),
        ("minimax", {}, "'linear_attention' (linear or sparse attention)"),
        ("nemotron_h", {}, "(linear or sparse attention)"),
        ("qwen3_next", {}, "'linear_attention' (linear or sparse attention)"),
        ("qwen3_vl_moe", {}, "no text generation model 'qwen3_vl_moe'"),
    ],
)
def test_family_is_refused_by_what_it_is(tmp_path: Path, family: str, fields: dict[str, Any], reason: str) -> None:
    AutoConfig.for_model(family, **fields).save_pretrained(tmp_path)

    with pytest.raises(CheckpointError) as refused:
        load_model(load_model_info(str(tmp_path)), "float32")

    assert reason in str(refused.value)
    assert str(tmp_path) in str(refused.value)


@pytest.mark.parametrize("method", ["awq", "gptq", "bitsandbytes", "compressed-tensors"])
def test_quantization_is_refused_by_name(tmp_path: Path, method: str) -> None:
    build_checkpoint(tmp_path, "mixtral", quantization_config={"quant_method": method, "bits": 4})

    with pytest.raises(CheckpointError, match=f"config.json.*{method}"):
        load_model(load_model_info(str(tmp_path)), "float32")


def test_gguf_file_is_refused_by_name(tmp_path: Path) -> None:
    AutoConfig.for_model("mixtral").save_pretrained(tmp_path)
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")

    with pytest.raises(CheckpointError, match=r"Q4_K_M\.gguf: weights in \.gguf files"):
        load_model(load_model_info(str(tmp_path)), "float32")


def _mixtral(path: Path) -> LoadedModel:
    return load_model(load_model_info(str(build_checkpoint(path, "mixtral"))), "float32")


def _wrap_attention(monkeypatch: pytest.MonkeyPatch, wrap: Callable[[Any], Any]) -> None:
    attention = modeling_mixtral.MixtralAttention
    monkeypatch.setattr(attention, "forward", wrap(attention.forward))


def test_attention_with_an_unknown_argument_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _wrap_attention(monkeypatch, lambda forward: functools.partialmethod(forward, softcap=30.0))

    with pytest.raises(CheckpointError, match="MixtralAttention with softcap is not supported"):
        _mixtral(tmp_path)


def test_mask_that_is_no_window_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def chunked(config: Any, **rest: Any) -> Any:
        config.attention_chunk_size = 100
        return masking_utils.create_chunked_causal_mask(config=config, **rest)

    monkeypatch.setattr(modeling_mixtral, "create_causal_mask", chunked)

    with pytest.raises(CheckpointError, match="neither causal nor a sliding window"):
        _mixtral(tmp_path)


def test_window_in_the_mask_alone_is_found(tmp_path: Path) -> None:
    """PhiMoE passes its window in the mask only, not to the attention function."""
    path = build_checkpoint(tmp_path, "phimoe", sliding_window=24)

    assert [layer.window for layer in load_model(load_model_info(str(path)), "float32").attention] == [24] * 3
    _assert_served_exactly(path, num_cases=2)


def test_rows_that_see_their_neighbours_beside_attention_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a convolution over the sequence would: right for one sequence alone, wrong for packed ones."""

    def shifted(forward: Any) -> Any:
        def mixed(module: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            before = torch.nn.functional.pad(hidden_states[:, :-1], (0, 0, 1, 0))
            return forward(module, hidden_states + before, *args, **kwargs)

        return mixed

    _wrap_attention(monkeypatch, shifted)
    check = AttentionCheck.prepare(_mixtral(tmp_path))

    with pytest.raises(CheckpointError, match="differ from the model's own attention"):
        check.verify(load_native(), 0)


@pytest.mark.parametrize("family", sorted(FAMILIES))
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_promised_family_passes_the_check_at_start(tmp_path: Path, family: str, dtype: str) -> None:
    loaded = load_model(load_model_info(str(build_checkpoint(tmp_path, family))), dtype)

    AttentionCheck.prepare(loaded).verify(load_native(), 0)


@pytest.mark.parametrize("family", sorted(FAMILIES | OTHER_FAMILIES))
def test_config_alone_says_what_a_token_takes_in_the_kv_cache(tmp_path: Path, family: str) -> None:
    """So that a cache which is too small is found before weights are loaded."""
    info = load_model_info(str(build_checkpoint(tmp_path / "m", family)))
    loaded = load_model(info, "bfloat16")
    exact = sum(layer.values_per_token for layer in loaded.attention)
    uneven = family in ("gemma4_text", "mimo_v2_flash")  # layers of several shapes: seen when it is built
    assert values_per_token(info.config) == (None if uneven else exact)
