"""Model types beyond those the project promises: small sizes, for a shorter proof that they are served exactly.

Sizes that all share are in model_builders; here is what a config calls differently. Windows are shorter than prompts.
"""

from __future__ import annotations

from typing import Any

NUM_EXPERTS = 8

_MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
_FIRST_DENSE = {"num_hidden_layers": 4, "mlp_layer_types": ["dense", "sparse", "sparse", "sparse"]}
_EXPERTS = {"num_experts": NUM_EXPERTS, "moe_intermediate_size": 48, "norm_topk_prob": True}
_ROUTED = {"n_routed_experts": NUM_EXPERTS, "n_shared_experts": 1, "moe_intermediate_size": 48, "norm_topk_prob": True}
_GROUPS = {"n_group": 4, "topk_group": 2}
_WINDOWS = {"head_dim": 32, "sliding_window": 24, "layer_types": _MIXED}
_GRANITE = {
    "num_local_experts": NUM_EXPERTS,
    "intermediate_size": 48,
    "shared_intermediate_size": 40,
    "embedding_multiplier": 3.0,
    "logits_scaling": 4.0,
    "residual_multiplier": 0.5,
    "attention_multiplier": 0.125,
}
_LATENT = {
    **_FIRST_DENSE,
    **_ROUTED,
    **_GROUPS,
    "num_key_value_heads": 4,
    "q_lora_rank": 40,
    "kv_lora_rank": 24,
    "qk_nope_head_dim": 20,
    "qk_rope_head_dim": 16,
    "v_head_dim": 28,
}

OTHER_FAMILIES: dict[str, dict[str, Any]] = {
    "afmoe": {
        **_EXPERTS,
        "head_dim": 32,
        "num_hidden_layers": 4,
        "num_dense_layers": 1,
        "num_shared_experts": 1,
        "sliding_window": 24,
        "global_attn_every_n_layers": 2,
        "mup_enabled": True,
    },
    "aria_text": {
        "moe_num_experts": NUM_EXPERTS,
        "moe_topk": 2,
        "moe_num_shared_experts": 1,
        "intermediate_size": 48,
        "head_dim": 16,
    },
    "axk1": _LATENT,
    "beam": {
        **_EXPERTS,
        **_FIRST_DENSE,
        **_GROUPS,
        "head_dim": 32,
        "sliding_window": 24,
        "layer_types": ["sliding_attention"] * 3 + ["full_attention"],
    },
    "cohere2_moe": {
        **_WINDOWS,
        "num_experts": NUM_EXPERTS,
        "intermediate_size": 48,
        "mlp_layer_types": ["sparse"] * 3,
        "num_shared_experts": 1,
    },
    "dots1": {
        **_ROUTED,
        "num_hidden_layers": 4,
        "first_k_dense_replace": 1,
        "n_group": 1,
        "topk_group": 1,
        "sliding_window": 24,
        "layer_types": ["full_attention", "full_attention", "sliding_attention", "sliding_attention"],
    },
    "ernie4_5_moe": {
        "num_hidden_layers": 4,
        "moe_num_experts": NUM_EXPERTS,
        "moe_k": 2,
        "moe_intermediate_size": 48,
        "moe_num_shared_experts": 1,
        "moe_layer_start_index": 1,
        "moe_layer_end_index": 3,
    },
    "exaone_moe": {
        **_EXPERTS,
        **_FIRST_DENSE,
        **_GROUPS,
        "first_k_dense_replace": 1,
        "num_shared_experts": 1,
        "sliding_window": 24,
        "sliding_window_pattern": "LG",
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
    "flex_olmo": {"num_experts": NUM_EXPERTS, "intermediate_size": 48},
    "flint": {**_EXPERTS, **_WINDOWS, "shared_expert_intermediate_size": 40, "mlp_only_layers": [0]},
    "gemma4_text": {
        "enable_moe_block": True,
        "num_experts": NUM_EXPERTS,
        "top_k_experts": 2,
        "moe_intermediate_size": 48,
        "head_dim": 32,
        "global_head_dim": 64,
        "sliding_window": 24,
        "layer_types": ["sliding_attention", "sliding_attention", "full_attention"],
        "num_kv_shared_layers": 0,
        "hidden_size_per_layer_input": 0,
    },
    "glm4_moe": {**_ROUTED, **_GROUPS, "num_hidden_layers": 4, "first_k_dense_replace": 1, "use_qk_norm": True},
    "glm4_moe_lite": _LATENT,
    "granitemoe_swa": {
        **_GRANITE,
        "sliding_window": 24,
        "layer_types": _MIXED,
        "layer_rope_theta": [10000.0, 5000.0, 10000.0],
    },
    "granitemoeshared": _GRANITE,
    "hunyuan_v1_moe": {"num_experts": NUM_EXPERTS, "moe_topk": 2, "intermediate_size": 48, "head_dim": 32},
    "hy_v3": {**_EXPERTS, **_FIRST_DENSE, "head_dim": 32, "num_shared_experts": 1},
    "kolibri1": {
        **_WINDOWS,
        "num_local_experts": NUM_EXPERTS,
        "moe_intermediate_size": 48,
        "shared_expert_intermediate_size": 40,
    },
    "laguna": {
        **_EXPERTS,
        **_WINDOWS,
        "shared_expert_intermediate_size": 40,
        "num_attention_heads_per_layer": [4, 8, 4],
        "mlp_layer_types": ["dense", "sparse", "sparse"],
    },
    "mellum": {
        **_WINDOWS,
        "num_local_experts": NUM_EXPERTS,
        "moe_intermediate_size": 48,
        "norm_topk_prob": True,
        "mlp_layer_types": ["sparse"] * 3,
    },
    "mimo_v2_flash": {
        **_ROUTED,
        **_FIRST_DENSE,
        "n_group": 1,
        "topk_group": 1,
        "head_dim": 32,
        "v_head_dim": 24,
        "sliding_window": 24,
        "layer_types": ["full_attention", *_MIXED],
    },
    "minimax_m2": {"num_local_experts": NUM_EXPERTS, "intermediate_size": 48, "head_dim": 32},
    "solar_open": {**_ROUTED, "n_group": 1, "topk_group": 1, "head_dim": 32},
}
