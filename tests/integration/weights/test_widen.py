"""Widening keeps the function, multiplies expert bytes, aligns expert matrices and refuses what it cannot do."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import pytest
import torch

from actors.convert.safetensors_files import PlannedTensor, order_loose_tensors, plan_shards
from actors.convert.widen import widen_checkpoint
from cluster.errors import CheckpointError, ConfigError

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]  # transformers' models take seconds to import

DEMO = Path(__file__).parents[3] / "models" / "moesaic-demo"


def _save_tiny(path: Path, model_type: str, **changes: Any) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM

    fields: dict[str, Any] = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 24,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 2,
        "num_experts_per_tok": 2,
        "max_position_embeddings": 64,
        "tie_word_embeddings": False,
    }
    fields["num_local_experts" if model_type == "mixtral" else "num_experts"] = 4
    torch.manual_seed(1)
    config = AutoConfig.for_model(model_type, **fields | changes)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(path)


def _logits_and_tokens(path: Path) -> tuple[torch.Tensor, list[int]]:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
    ids = torch.arange(1, 13)[None]
    with torch.no_grad():
        logits = model(ids).logits
    tokens = model.generate(ids, max_new_tokens=8, do_sample=False, pad_token_id=0)
    return logits, tokens[0].tolist()


def _read_header(path: Path) -> tuple[int, dict[str, Any]]:
    with path.open("rb") as file:
        (size,) = struct.unpack("<Q", file.read(8))
        return 8 + size, json.loads(file.read(size))


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("qwen3_moe", {"moe_intermediate_size": 16, "head_dim": 16}),
        ("qwen3_moe", {"moe_intermediate_size": 16, "head_dim": 16, "mlp_only_layers": [0]}),
        ("mixtral", {}),
        ("olmoe", {}),
        (
            "deepseek_v3",
            {
                "moe_intermediate_size": 16,
                "n_routed_experts": 4,
                "n_shared_experts": 2,
                "n_group": 2,
                "topk_group": 1,
                "first_k_dense_replace": 1,
                "q_lora_rank": 8,
                "kv_lora_rank": 8,
                "qk_rope_head_dim": 8,
                "qk_nope_head_dim": 8,
                "v_head_dim": 8,
            },
        ),
    ],
    ids=["qwen3", "qwen3-dense-layer", "mixtral", "olmoe", "deepseek-shared"],
)
def test_widened_model_computes_the_same(tmp_path: Path, model_type: str, changes: dict[str, Any]) -> None:
    _save_tiny(tmp_path / "narrow", model_type, **changes)
    report = widen_checkpoint(tmp_path / "narrow", tmp_path / "wide", factor=4, seed=3)

    narrow_logits, narrow_tokens = _logits_and_tokens(tmp_path / "narrow")
    wide_logits, wide_tokens = _logits_and_tokens(tmp_path / "wide")
    scale = narrow_logits.abs().max()
    assert float((wide_logits - narrow_logits).abs().max() / scale) < 1e-4
    assert wide_tokens == narrow_tokens
    assert report.max_residual == 0.0
    assert not (tmp_path / "wide.partial").exists()


def test_expert_bytes_grow_by_the_factor_in_every_float_type(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    _save_tiny(tmp_path / "a", "qwen3_moe", moe_intermediate_size=16, head_dim=16)
    tensors = load_file(tmp_path / "a" / "model.safetensors")
    expert_bytes = sum(t.numel() * 4 for name, t in tensors.items() if ".experts." in name)
    for dtype, num_bytes in ((torch.float32, 4), (torch.bfloat16, 2), (torch.float16, 2)):
        save_file({name: t.to(dtype) for name, t in tensors.items()}, tmp_path / "a" / "model.safetensors")
        report = widen_checkpoint(tmp_path / "a", tmp_path / str(dtype), factor=5)
        assert report.expert_bytes == expert_bytes // 4 * num_bytes * 5
        assert report.max_residual <= (2**-10 if dtype == torch.float16 else 0.0)  # subnormal float16 may round
        assert json.loads((tmp_path / str(dtype) / "config.json").read_text())["moe_intermediate_size"] == 80


def test_neurons_are_split_unevenly_and_shuffled() -> None:
    from actors.convert.neurons import widen_mlp

    gate = torch.arange(8.0)[:, None].repeat(1, 4)  # row i holds i: tells where a neuron came from
    widened, residual = widen_mlp({"gate": gate, "up": gate, "down": torch.ones(4, 8)}, factor=6, seed=1)
    origin = widened["gate"][:, 0].long()
    assert residual == 0.0
    assert torch.equal(origin.bincount(), torch.full((8,), 6))
    assert not torch.equal(origin, origin.sort().values)
    assert len(set(widened["down"][0].tolist())) > 2
    again, _ = widen_mlp({"gate": gate, "up": gate, "down": torch.ones(4, 8)}, factor=6, seed=1)
    assert torch.equal(again["down"], widened["down"])


def test_demo_model_has_page_aligned_adjacent_experts(tmp_path: Path) -> None:
    widen_checkpoint(DEMO, tmp_path / "wide", factor=2)
    data_start, header = _read_header(tmp_path / "wide" / "model.safetensors")
    experts = [(name, info) for name, info in header.items() if ".experts." in name]
    assert len(experts) == 12 * 32 * 3
    assert all((data_start + info["data_offsets"][0]) % 4096 == 0 for _, info in experts)
    for first in range(0, len(experts), 3):
        stems = {name.rsplit(".", 2)[0] for name, _ in experts[first : first + 3]}
        offsets = [info["data_offsets"] for _, info in experts[first : first + 3]]
        assert len(stems) == 1
        assert [begin for begin, _ in offsets[1:]] == [end for _, end in offsets[:-1]]
    layers = [int(name.split(".layers.")[1].split(".")[0]) for name, _ in experts]
    assert layers == sorted(layers)


def test_shards_are_bounded_and_indexed(tmp_path: Path) -> None:
    _save_tiny(tmp_path / "narrow", "qwen3_moe", moe_intermediate_size=16, head_dim=16)
    report = widen_checkpoint(tmp_path / "narrow", tmp_path / "wide", factor=2, max_shard_bytes=40_000)
    assert report.num_shards > 1
    index = json.loads((tmp_path / "wide" / "model.safetensors.index.json").read_text())
    for name in set(index["weight_map"].values()):
        data_start, header = _read_header(tmp_path / "wide" / name)
        assert (tmp_path / "wide" / name).stat().st_size - data_start <= 40_000
        assert all(index["weight_map"][tensor] == name for tensor in header if tensor != "__metadata__")
    again = widen_checkpoint(tmp_path / "wide", tmp_path / "wider", factor=2)  # reads the shards back
    assert again.num_experts == report.num_experts
    assert _logits_and_tokens(tmp_path / "wider")[1] == _logits_and_tokens(tmp_path / "narrow")[1]


def test_plan_keeps_units_whole_and_items_aligned() -> None:
    def planned(name: str, unit: str, num_bytes: int, dtype: str = "BF16") -> PlannedTensor:
        return PlannedTensor(name=name, dtype=dtype, shape=(num_bytes,), num_bytes=num_bytes, unit=unit)

    tensors = [planned(f"{unit}.{part}", unit, 40) for unit in "abc" for part in range(3)]
    shards = plan_shards(tensors, max_shard_bytes=250)
    assert [[t.unit for t in shard] for shard in shards] == [["a"] * 3 + ["b"] * 3, ["c"] * 3]
    loose = [planned("odd16", "1", 6), planned("page", "2", 8192), planned("odd32", "3", 12, "F32")]
    assert [t.name for t in order_loose_tensors(loose)] == ["page", "odd32", "odd16"]


def test_refuses_with_names(tmp_path: Path) -> None:
    source = tmp_path / "narrow"
    _save_tiny(source, "qwen3_moe", moe_intermediate_size=16, head_dim=16)
    (tmp_path / "taken").mkdir()
    with pytest.raises(ConfigError, match="exists already"):
        widen_checkpoint(source, tmp_path / "taken", factor=2)
    with pytest.raises(ConfigError, match="factor 0"):
        widen_checkpoint(source, tmp_path / "x", factor=0)

    config_path = source / "config.json"
    config = json.loads(config_path.read_text())
    config_path.write_text(json.dumps(config | {"moe_intermediate_size": 17}))
    with pytest.raises(CheckpointError, match=r"experts\.0\.gate_proj\.weight has shape \(16, 32\)"):
        widen_checkpoint(source, tmp_path / "x", factor=2)
    config_path.write_text(json.dumps(config | {"quantization_config": {}}))
    with pytest.raises(CheckpointError, match="quantization_config"):
        widen_checkpoint(source, tmp_path / "x", factor=2)
    config_path.write_text(json.dumps(config))

    shard = source / "model.safetensors"
    whole = shard.read_bytes()
    shard.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: tensor .* cut short"):
        widen_checkpoint(source, tmp_path / "x", factor=2)
    shard.unlink()
    with pytest.raises(CheckpointError, match=r"no \*\.safetensors file"):
        widen_checkpoint(source, tmp_path / "x", factor=2)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["narrow", "taken"]


def test_refuses_one_width_for_dense_and_expert_mlps(tmp_path: Path) -> None:
    source = tmp_path / "narrow"
    _save_tiny(source, "qwen3_moe", moe_intermediate_size=24, head_dim=16, mlp_only_layers=[0])
    config = json.loads((source / "config.json").read_text())
    del config["moe_intermediate_size"]
    (source / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"layers\.0\.mlp\.(gate|up|down)_proj\.weight is a dense MLP"):
        widen_checkpoint(source, tmp_path / "x", factor=2)
