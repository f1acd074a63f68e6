"""Quantised and unusual checkpoints, read as stored, answer as transformers does with the dequantised weights."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from identity import Reference, assert_identical, engine_parts, generate_greedy, random_cases
from model_builders import NUM_EXPERTS, TOP_K, build_checkpoint
from quantised_builders import FP8_BLOCK, Pair, build_fp8, build_gpt_oss, edit
from torch import Tensor

from actors.experts.compute import KernelPlan
from actors.model.checkpoint import load_model
from actors.weights.formats.base import TORCH_DTYPES
from actors.weights.slots import held_expert_bytes
from cluster.errors import CheckpointError
from cluster.model.info import load_model_info

pytestmark = pytest.mark.slow

GPT_OSS = {"intermediate_size": 96}
CHECKPOINTS: dict[str, Callable[[Path], Pair]] = {
    "gpt_oss": lambda path: build_gpt_oss(path, **GPT_OSS),
    "deepseek_v3": lambda path: build_fp8(path, "deepseek_v3"),
    "qwen3_moe": lambda path: build_fp8(path, "qwen3_moe", scale_dtype=torch.bfloat16),
}


@pytest.fixture(scope="module", params=sorted(CHECKPOINTS))
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return CHECKPOINTS[request.param](tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_gpt_oss(tmp_path_factory.mktemp("gpt_oss"), **GPT_OSS)


@pytest.fixture(scope="module")
def fp8(tmp_path_factory: pytest.TempPathFactory) -> Pair:
    return build_fp8(tmp_path_factory.mktemp("fp8"), "qwen3_moe")


def _smallest(path: Path, dtype: str = "float32") -> int:
    """Bytes of one token's experts of a layer as held."""
    layout = load_model(load_model_info(str(path)), dtype, dense=False).layout
    return TOP_K * held_expert_bytes(layout, TORCH_DTYPES[layout.stored_dtype]) // len(layout.experts)


def _refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as raised:
        load_model(load_model_info(str(path)), "float32")
    return raised.value.message


def test_quantised_checkpoint_answers_as_its_dequantised_weights(pair: Pair) -> None:
    cases = random_cases(8, vocab_size=4096)

    with engine_parts(pair.packed, cache=str(_smallest(pair.packed))) as parts:
        answers = generate_greedy(parts.engine, cases, alone=False)
        assert parts.backend is not None
        assert parts.backend.store.num_slots == TOP_K

    assert_identical(Reference(pair.plain), cases, answers)


@pytest.mark.parametrize("torch_from_rows", [0, 1 << 30], ids=["torch", "native"])
def test_bfloat16_is_near_float32(pair: Pair, torch_from_rows: int) -> None:
    """One layer's routed output in bfloat16, by either path, is that of the plain weights up to rounding."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(NUM_EXPERTS, generator=generator)[:TOP_K] for _ in range(12)])
    x, weights = torch.randn(12, 64, generator=generator).bfloat16(), torch.full((12, TOP_K), 0.5)
    with engine_parts(pair.plain) as plain, engine_parts(pair.packed, dtype="bfloat16") as packed:
        assert plain.backend is not None and packed.backend is not None
        packed.backend.compute.plan = KernelPlan(torch_from_rows, "as the test says")
        layer = plain.backend.store.layout.layers[1]
        expected = plain.backend.partial_sums(layer, x.float(), ids, weights)
        got = packed.backend.partial_sums(layer, x, ids, weights)

    torch.testing.assert_close(got / expected.std(), expected / expected.std(), rtol=0.05, atol=0.05)


def test_transposed_interleaved_experts_answer_as_transformers(gpt_oss: Pair) -> None:
    """GPT-OSS without quantisation: [E, D, 2I] with gate and up in turn, biases, held in the file's layout."""
    cases = random_cases(8, vocab_size=4096, seed=1)
    with engine_parts(gpt_oss.plain, cache=str(_smallest(gpt_oss.plain))) as parts:
        answers = generate_greedy(parts.engine, cases, alone=False)

    assert_identical(Reference(gpt_oss.plain), cases, answers)


def test_stored_wide_experts_are_converted_with_their_biases(gpt_oss: Pair) -> None:
    layout = load_model(load_model_info(str(gpt_oss.plain)), "bfloat16", dense=False).layout

    with engine_parts(gpt_oss.plain, dtype="bfloat16") as parts:
        assert parts.backend is not None
        store = parts.backend.store
        ((_, weights),) = next(iter(store.acquire(0, [3])))
        assert weights.gate.data.dtype == torch.bfloat16
        assert weights.gate.bias is not None and weights.gate.bias.dtype == torch.bfloat16
        assert store.model_bytes < layout.stored_bytes * 0.6


def test_budget_counts_packed_bytes(gpt_oss: Pair) -> None:
    """4.25 bits a weight, biases, and what reading whole pages adds."""
    layout = load_model(load_model_info(str(gpt_oss.packed)), "float32", dense=False).layout
    weights = 3 * 64 * GPT_OSS["intermediate_size"]
    biases = 2 * (2 * GPT_OSS["intermediate_size"] + 64)

    assert layout.stored_bytes == 3 * NUM_EXPERTS * (weights * 17 // 32 + biases)
    held = held_expert_bytes(layout, torch.uint8) // (3 * NUM_EXPERTS)
    assert weights * 17 // 32 + biases <= held <= weights * 17 // 32 + biases + 6 * 2 * 4096


def _drop(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        del tensors[name]

    return change


def _reshape(name: str) -> Callable[[dict[str, Tensor]], None]:
    def change(tensors: dict[str, Tensor]) -> None:
        tensors[name] = tensors[name][:1].contiguous()

    return change


EXPERT = "model.layers.2.mlp.experts.5.up_proj.weight"
DENSE = "model.layers.1.self_attn.o_proj.weight"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (_drop(f"{EXPERT}_scale_inv"), rf"model\.safetensors: tensor {EXPERT}_scale_inv is missing"),
        (_drop(f"{DENSE}_scale_inv"), rf"model\.safetensors: tensor {DENSE}_scale_inv is missing"),
        (_reshape(f"{EXPERT}_scale_inv"), rf"model\.safetensors: tensor {EXPERT}_scale_inv has shape \(1, 2\)"),
        (_reshape(f"{DENSE}_scale_inv"), rf"model\.safetensors: tensor {DENSE}_scale_inv has shape"),
    ],
)
def test_damaged_fp8_names_file_and_tensor(
    fp8: Pair, tmp_path: Path, change: Callable[[dict[str, Tensor]], None], named: str
) -> None:
    packed = shutil.copytree(fp8.packed, tmp_path / "packed")
    edit(packed, change)

    assert re.search(named, _refused(packed))


@pytest.mark.parametrize("part", ["gate_up_proj_scales", "down_proj_blocks", "down_proj_bias"])
def test_damaged_mxfp4_names_the_tensor(gpt_oss: Pair, tmp_path: Path, part: str) -> None:
    packed = shutil.copytree(gpt_oss.packed, tmp_path / "packed")
    edit(packed, _drop(f"model.layers.1.mlp.experts.{part}"))

    message = _refused(packed)

    assert str(packed) in message and "model.layers.1.mlp.experts" in message and part.split("_")[0] in message


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"quant_method": "awq"}, "'awq'"),
        ({"quant_method": "gptq"}, "'gptq'"),
        ({"quant_method": "bitsandbytes"}, "'bitsandbytes'"),
        ({"quant_method": "fp8", "weight_block_size": None}, "weight_block_size is None"),
        ({"quant_method": "fp8", "weight_block_size": [FP8_BLOCK, 20]}, "32 x 20"),
    ],
)
def test_other_quantisation_is_refused_by_name(
    fp8: Pair, tmp_path: Path, settings: dict[str, object], named: str
) -> None:
    packed = shutil.copytree(fp8.packed, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    (packed / "config.json").write_text(json.dumps(config | {"quantization_config": settings}))

    assert named in _refused(packed)


def test_unquantised_checkpoint_with_fp8_weights_is_refused(fp8: Pair, tmp_path: Path) -> None:
    packed = shutil.copytree(fp8.packed, tmp_path / "packed")
    config = json.loads((packed / "config.json").read_text())
    del config["quantization_config"]
    (packed / "config.json").write_text(json.dumps(config))

    assert "weight_block_size" in _refused(packed)


def test_plain_checkpoint_is_unchanged(tmp_path: Path) -> None:
    """The common case keeps its form: three row-major matrices, no conversion."""
    path = build_checkpoint(tmp_path, "qwen3_moe")

    layout = load_model(load_model_info(str(path)), "float32", dense=False).layout

    assert layout.form.part_names == ("gate", "up", "down")
    assert not layout.form.transposed and not layout.form.interleaved
