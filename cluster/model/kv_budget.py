"""How large a worker's KV cache is, and how long a sequence may be in it. Pure: config.json and bytes in, a plan out.

Known before any weight is loaded. `auto` is room for one sequence of the model's length, or the usual size where that
is more. A length that nobody asked for gives way to the memory that there is; one that somebody asked for does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

from cluster.config.sizes import AUTO, parse_size
from cluster.errors import ConfigError

USUAL_BYTES = 256 * 2**20
SHARE = 0.5  # of a process's free memory: the rest is for weights and experts

_UNEVEN = ("per_layer_config", "global_head_dim", "v_head_dim", "swa_num_key_value_heads")  # layers differ, or K and V
_LEAST_TOKENS = 16
_STEP_TOKENS = 1024  # a lowered length is a multiple of it: a little more or less memory gives the same


@dataclass(frozen=True, slots=True)
class KvPlan:
    """`num_bytes` of KV cache for sequences of up to `max_model_len` tokens. notice: what was lowered, in words."""

    num_bytes: int
    max_model_len: int
    notice: str | None = None


def values_per_token(config: Mapping[str, Any]) -> int | None:
    """Numbers that a token occupies in the KV cache of all layers; None where config.json does not say.

    Args: config: of the model; latents (multi-head latent attention) are kept as they are.
    """
    text = cast("Mapping[str, Any]", config.get("text_config", config))
    layers = _number(text, "num_hidden_layers", "n_layers")
    rank = _number(text, "kv_lora_rank")
    if layers is None:
        return None
    if rank is not None:
        rotated = _number(text, "qk_rope_head_dim")
        return None if rotated is None else layers * (rank + rotated)
    if any(name in text for name in _UNEVEN):
        return None
    heads = _number(text, "num_attention_heads", "n_heads")
    hidden = _number(text, "hidden_size", "d_model")
    if heads is None or hidden is None:
        return None
    head_dim = _number(text, "head_dim") or hidden // heads
    return layers * 2 * (_number(text, "num_key_value_heads") or heads) * head_dim


def value_bytes(config: Mapping[str, Any], dtype: str) -> int:
    """Bytes of one number. Args: dtype: as configured; auto: bfloat16 for bfloat16 checkpoints, else float32."""
    if dtype == AUTO:
        text = cast("Mapping[str, Any]", config.get("text_config", config))
        stored = (text.get("dtype"), text.get("torch_dtype"), config.get("dtype"), config.get("torch_dtype"))
        return 2 if "bfloat16" in stored else 4
    return 4 if dtype == "float32" else 2


def blocks_for(num_tokens: int, block_size: int) -> int:
    """Blocks that one sequence of `num_tokens` needs; block 0 is for padding."""
    return -(-num_tokens // block_size) + 1


def plan_kv(
    setting: str, *, token_bytes: int, block_size: int, model_len: int, is_asked: bool, available_bytes: int
) -> KvPlan:
    """Size and length.

    Args:
        setting: attention.kv_cache. token_bytes: of all layers. model_len: the model's length, or the one asked for.
        is_asked: model.max_model_len is set. available_bytes: that `auto` may take.
    Raises:
        ConfigError: no sequence of the length asked for fits, or none worth having.
    """
    block_bytes = token_bytes * block_size
    needed = blocks_for(model_len, block_size) * block_bytes
    num_bytes = min(max(needed, USUAL_BYTES), available_bytes) if setting == AUTO else parse_size(setting)
    if num_bytes >= needed:
        return KvPlan(num_bytes, model_len)
    room = max(0, (num_bytes // block_bytes - 1) * block_size)
    what = (
        f"{_mib(num_bytes)} that may be taken here"
        if setting == AUTO
        else f"{setting} ({num_bytes // block_bytes} blocks)"
    )
    fact = f"one sequence of {model_len} tokens needs {_mib(needed)} ({token_bytes} bytes a token), not the {what}"
    if is_asked or room < _LEAST_TOKENS:
        way_out = "free memory" if setting == AUTO else f"give at least {needed} bytes"
        raise ConfigError(f"config field attention.kv_cache: {fact}; {way_out}, or lower model.max_model_len")
    length = room // _STEP_TOKENS * _STEP_TOKENS or room
    return KvPlan(
        num_bytes,
        length,
        f"sequences may have {length} tokens: {fact}; --kv-cache {_mib(needed)} serves the model's whole length",
    )


def _number(text: Mapping[str, Any], *names: str) -> int | None:
    return next((value for name in names if isinstance(value := text.get(name), int) and value > 0), None)


def _mib(num_bytes: int) -> str:
    return f"{-(-num_bytes // 2**20)}MiB"
