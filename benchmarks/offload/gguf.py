"""Writes a Qwen3-MoE checkpoint as GGUF in bfloat16, for llama.cpp: same weights, same tokenizer, experts stacked."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate": "ffn_gate_inp",
}
_EXPERTS = {"gate_proj": "ffn_gate_exps", "up_proj": "ffn_up_exps", "down_proj": "ffn_down_exps"}
_IN_FLOAT32 = ("norm", "ffn_gate_inp")  # what llama.cpp wants in float32


def write_gguf(source: Path, target: Path) -> Path:
    """Convert once; a finished file is kept.

    Raises:
        ValueError: not a qwen3_moe checkpoint in one safetensors file.
    """
    if target.is_file():
        return target
    import gguf
    from safetensors import safe_open

    config = json.loads((source / "config.json").read_text())
    if config["model_type"] != "qwen3_moe" or not (source / "model.safetensors").is_file():
        raise ValueError(f"{source}: only qwen3_moe in one file is converted, this is {config['model_type']}")
    partial = target.with_suffix(".partial")
    writer = gguf.GGUFWriter(partial, "qwen3moe")
    _write_facts(writer, config)
    _write_tokenizer(writer, source, config)
    with safe_open(source / "model.safetensors", framework="pt") as tensors:
        for name, array in _renamed(tensors, config):
            if any(part in name for part in _IN_FLOAT32):
                writer.add_tensor(name, array.float().numpy())
            else:
                raw = array.contiguous().view(dtype=_int16()).numpy().view(np.uint8)
                writer.add_tensor(name, raw, raw_dtype=gguf.GGMLQuantizationType.BF16)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    partial.rename(target)
    return target


def _write_facts(writer: Any, config: dict[str, Any]) -> None:
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_freq_base(config["rope_parameters"]["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_expert_count(config.get("num_experts") or config["num_local_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_vocab_size(config["vocab_size"])


def _write_tokenizer(writer: Any, source: Path, config: dict[str, Any]) -> None:
    import gguf

    tokenizer = json.loads((source / "tokenizer.json").read_text())
    special = {entry["id"] for entry in tokenizer["added_tokens"]}
    ids = {id_: text for text, id_ in tokenizer["model"]["vocab"].items()}
    ids |= {entry["id"]: entry["content"] for entry in tokenizer["added_tokens"]}
    tokens = [ids.get(i, f"[PAD{i}]") for i in range(config["vocab_size"])]
    kinds = [gguf.TokenType.CONTROL if i in special else gguf.TokenType.NORMAL for i in range(len(tokens))]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([" ".join(pair) for pair in tokenizer["model"]["merges"]])
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"][0])
    writer.add_add_bos_token(False)


def _renamed(tensors: Any, config: dict[str, Any]) -> Any:
    """llama.cpp's names and tensors, one at a time; a layer's experts as one [experts, out, in] tensor."""
    import torch

    yield "token_embd.weight", tensors.get_tensor("model.embed_tokens.weight")
    yield "output_norm.weight", tensors.get_tensor("model.norm.weight")
    num_experts = config.get("num_experts") or config["num_local_experts"]
    for layer in range(config["num_hidden_layers"]):
        stem = f"model.layers.{layer}."
        for theirs, ours in _LAYER.items():
            yield f"blk.{layer}.{ours}.weight", tensors.get_tensor(f"{stem}{theirs}.weight")
        for theirs, ours in _EXPERTS.items():
            matrices = [tensors.get_tensor(f"{stem}mlp.experts.{e}.{theirs}.weight") for e in range(num_experts)]
            yield f"blk.{layer}.{ours}.weight", torch.stack(matrices)
    if "lm_head.weight" in tensors.keys():  # noqa: SIM118 - not a mapping
        yield "output.weight", tensors.get_tensor("lm_head.weight")


def _int16() -> Any:
    import torch

    return torch.int16
