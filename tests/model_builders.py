"""Small random checkpoints of every family under test, written as users have them: weights, config, tokenizer.

To add a family, add an entry to FAMILIES: what its config calls things, and nothing else.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

DEMO = Path(__file__).resolve().parents[1] / "models" / "moesaic-demo"
NUM_EXPERTS = 8
TOP_K = 2

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Family:
    """How one model type names its sizes; `fields` are merged over the common ones."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)


FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "qwen3_moe",
            {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True},
        ),
        Family("olmoe", {"num_experts": NUM_EXPERTS, "intermediate_size": 48}),
        Family("mixtral", {"num_local_experts": NUM_EXPERTS, "intermediate_size": 80, "sliding_window": None}),
    )
}

_COMMON: dict[str, Any] = {
    "vocab_size": 4096,  # of the demo's tokenizer
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_experts_per_tok": TOP_K,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.2,  # far from uniform logits and gates, so that ties are as rare as in trained models
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}


def build_checkpoint(
    path: Path,
    family: str,
    *,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    fused: bool = False,
    max_shard_size: str = "1GB",
    **changes: Any,
) -> Path:
    """Write a random checkpoint of `family` to `path`.

    Args:
        fused: experts as transformers holds them (one 3-D tensor a layer), not as the family publishes them.
        changes: config fields over those of the family.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(seed)
    config = AutoConfig.for_model(family, **(_COMMON | FAMILIES[family].fields | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path, save_original_format=not fused, max_shard_size=max_shard_size)
    for name in _TOKENIZER_FILES:
        shutil.copy(DEMO / name, path / name)
    return path
