"""The KV cache's size: known from config.json, room for one sequence, a length that gives way only where it may."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster import app
from cluster.config.load import load_config
from cluster.errors import ConfigError
from cluster.model.kv_budget import USUAL_BYTES, KvPlan, blocks_for, plan_kv, value_bytes, values_per_token

GIB = 2**30
QWEN3_30B_A3B: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "dtype": "bfloat16",
    "head_dim": 128,
    "hidden_size": 2048,
    "intermediate_size": 6144,
    "max_position_embeddings": 40960,
    "moe_intermediate_size": 768,
    "num_attention_heads": 32,
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "num_hidden_layers": 48,
    "num_key_value_heads": 4,
    "vocab_size": 151936,
}
DEEPSEEK_V3: dict[str, Any] = {
    "num_hidden_layers": 61,
    "num_attention_heads": 128,
    "num_key_value_heads": 128,
    "hidden_size": 7168,
    "kv_lora_rank": 512,
    "qk_rope_head_dim": 64,
    "torch_dtype": "bfloat16",
}


def _plan(setting: str, *, length: int = 40960, asked: bool = False, available: float = 64 * GIB) -> KvPlan:
    num_values = values_per_token(QWEN3_30B_A3B)
    assert num_values is not None
    return plan_kv(
        setting,
        token_bytes=num_values * value_bytes(QWEN3_30B_A3B, "auto"),
        block_size=16,
        model_len=length,
        is_asked=asked,
        available_bytes=int(available),
    )


def test_bytes_of_a_token() -> None:
    assert values_per_token(QWEN3_30B_A3B) == 48 * 2 * 4 * 128
    assert values_per_token(DEEPSEEK_V3) == 61 * (512 + 64)
    assert values_per_token({"text_config": QWEN3_30B_A3B}) == values_per_token(QWEN3_30B_A3B)
    assert values_per_token({"num_hidden_layers": 3}) is None


@pytest.mark.parametrize(
    ("config", "dtype", "num_bytes"),
    [
        ({"dtype": "bfloat16"}, "auto", 2),
        ({"torch_dtype": "bfloat16"}, "auto", 2),
        ({"text_config": {"dtype": "bfloat16"}}, "auto", 2),
        ({"dtype": "float16"}, "auto", 4),
        ({}, "auto", 4),
        ({"dtype": "bfloat16"}, "float32", 4),
        ({"dtype": "float32"}, "bfloat16", 2),
    ],
)
def test_bytes_of_a_number(config: dict[str, Any], dtype: str, num_bytes: int) -> None:
    assert value_bytes(config, dtype) == num_bytes


def test_auto_is_one_whole_sequence() -> None:
    plan = _plan("auto")
    assert plan == KvPlan(blocks_for(40960, 16) * 16 * 98304, 40960)
    assert plan.num_bytes > 3.7 * GIB


def test_auto_of_a_short_model_is_the_usual_size() -> None:
    assert _plan("auto", length=256) == KvPlan(USUAL_BYTES, 256)


@pytest.mark.parametrize(("setting", "available"), [("2GiB", 64 * GIB), ("auto", 2 * GIB)])
def test_a_length_that_nobody_asked_for_gives_way(setting: str, available: float) -> None:
    plan = _plan(setting, available=available)
    assert plan.max_model_len == 21 * 1024 and plan.num_bytes == 2 * GIB
    assert plan.notice is not None
    for part in ("21504", "40960", "98304 bytes a token", "--kv-cache"):
        assert part in plan.notice
    assert blocks_for(plan.max_model_len, 16) * 16 * 98304 <= plan.num_bytes


@pytest.mark.parametrize(("setting", "available"), [("2GiB", 64 * GIB), ("auto", 2 * GIB)])
def test_a_length_that_somebody_asked_for_does_not(setting: str, available: float) -> None:
    with pytest.raises(ConfigError, match=r"attention\.kv_cache.*40960.*max_model_len"):
        _plan(setting, available=available, asked=True)


@pytest.mark.parametrize(("setting", "available"), [("1MiB", 64 * GIB), ("auto", 2**20), ("auto", 0)])
def test_no_sequence_worth_having(setting: str, available: float) -> None:
    with pytest.raises(ConfigError, match=r"attention\.kv_cache"):
        _plan(setting, available=available)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN3_30B_A3B))
    return tmp_path


def _settle(monkeypatch: pytest.MonkeyPatch, model: Path, free: float, **fields: Any) -> tuple[int | None, list[str]]:
    monkeypatch.setattr("cluster.node_memory.limits.free_memory_bytes", lambda: int(free))
    notices: list[str] = []
    sections = {"model": {"path": str(model)}, "attention": {}} | fields
    return app.settle_length(load_config(None, sections), notices.append).model.max_model_len, notices


def test_a_large_model_starts_without_a_size(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    """256 MiB, once the default, are 2,730 tokens of its 40,960."""
    assert _settle(monkeypatch, model, 64 * GIB) == (None, [])
    length, (notice,) = _settle(monkeypatch, model, 4 * GIB)
    assert length == 21 * 1024 and "40960" in notice


def test_a_size_for_less_lowers_the_length_everywhere(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    length, (notice,) = _settle(monkeypatch, model, 64 * GIB, attention={"kv_cache": "2GiB"})
    assert length == 21 * 1024 and "40960" in notice


def test_workers_of_one_node_share_its_memory(monkeypatch: pytest.MonkeyPatch, model: Path) -> None:
    length, _ = _settle(monkeypatch, model, 8 * GIB, attention={"workers": 2})
    assert length == 21 * 1024
