"""Small random checkpoints of every family under test, written as users have them: weights, config, tokenizer.

To add a family, add an entry to FAMILIES, or to OTHER_FAMILIES for the shorter proof: what its config calls things, and
nothing else.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from other_families import NUM_EXPERTS, OTHER_FAMILIES

DEMO = Path(__file__).resolve().parents[2] / "models" / "moesaic-demo"
TOP_K = 2

_TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja")


@dataclass(frozen=True, slots=True)
class Family:
    """How one model type names its sizes; `fields` are merged over the common ones."""

    model_type: str
    fields: dict[str, Any] = field(default_factory=dict)


_LATENT: dict[str, Any] = {
    "num_hidden_layers": 4,
    "first_k_dense_replace": 1,
    "num_key_value_heads": 4,
    "n_routed_experts": NUM_EXPERTS,
    "n_shared_experts": 2,
    "moe_intermediate_size": 48,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 28,
    "n_group": 4,
    "topk_group": 2,
    "routed_scaling_factor": 1.5,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 10000.0,
        "factor": 8.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "mscale": 0.7,
        "mscale_all_dim": 0.7,
    },
}

FAMILIES: dict[str, Family] = {
    family.model_type: family
    for family in (
        Family(
            "qwen3_moe",
            {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 48, "head_dim": 32, "norm_topk_prob": True},
        ),
        Family("olmoe", {"num_experts": NUM_EXPERTS, "intermediate_size": 48}),
        Family("mixtral", {"num_local_experts": NUM_EXPERTS, "intermediate_size": 80, "sliding_window": None}),
        Family("deepseek_v2", _LATENT | {"topk_method": "group_limited_greedy"}),
        Family("deepseek_v3", _LATENT | {"norm_topk_prob": True}),
        Family(
            "qwen2_moe",
            {
                "num_experts": NUM_EXPERTS,
                "moe_intermediate_size": 48,
                "shared_expert_intermediate_size": 80,
                "use_sliding_window": True,
                "sliding_window": 24,
                "max_window_layers": 1,
            },
        ),
        Family(
            "phimoe",
            {
                "num_local_experts": NUM_EXPERTS,
                "intermediate_size": 48,
                "attention_bias": True,
                "lm_head_bias": True,
                "max_position_embeddings": 2048,
                "rope_parameters": {
                    "rope_type": "longrope",
                    "rope_theta": 10000.0,
                    "original_max_position_embeddings": 512,
                    "short_factor": [1.0 + i / 10 for i in range(8)],
                    "long_factor": [2.0 + i for i in range(8)],
                    "short_mscale": 1.2,
                    "long_mscale": 1.3,
                },
            },
        ),
        Family(
            "gpt_oss",
            {
                "num_local_experts": NUM_EXPERTS,
                "intermediate_size": 48,
                "head_dim": 16,
                "sliding_window": 24,
                "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
            },
        ),
        Family(
            "granitemoe",
            {
                "num_local_experts": NUM_EXPERTS,
                "intermediate_size": 48,
                "embedding_multiplier": 3.0,
                "logits_scaling": 4.0,
                "residual_multiplier": 0.5,
                "attention_multiplier": 0.125,
            },
        ),
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
    fields = FAMILIES[family].fields if family in FAMILIES else OTHER_FAMILIES[family]
    config = AutoConfig.for_model(family, **(_COMMON | fields | changes))
    model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model.save_pretrained(path, save_original_format=not fused, max_shard_size=max_shard_size)
    for name in _TOKENIZER_FILES:
        shutil.copy(DEMO / name, path / name)
    return path
