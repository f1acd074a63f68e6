"""Builds the model with its dense weights only; routed experts stay on the meta device.

Knows transformers' model classes and tensor names; knows nothing of batches. Raises CheckpointError
with file and tensor for everything that does not fit.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.model.expert_layout import ConversionRules, ExpertLayout, conversion_rules, derive_layout, is_expert_key
from actors.model.safetensors_index import TensorRef, read_index
from actors.model.seams import IMPLEMENTATION, experts_modules, layer_of, register_seams
from cluster.errors import CheckpointError
from cluster.model_info import ModelInfo

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """The dense part, ready to run, and where the experts are."""

    model: PreTrainedModel
    layout: ExpertLayout
    dtype: torch.dtype
    top_k: int
    activation: str


def load_model(info: ModelInfo, dtype_name: str) -> LoadedModel:
    """Build on meta, load dense weights, locate experts. Args: dtype_name: auto, bfloat16 or float32.

    Raises:
        CheckpointError: missing or truncated shard, wrong shape, unsupported family; names file and tensor.
    """
    index = read_index(info.path)
    register_seams()
    config = _read_config(info)
    _refuse_unsupported(info, config)
    dtype = _compute_dtype(dtype_name, index)
    model = _skeleton(info, config, dtype)
    experts = experts_modules(model)
    if not experts:
        raise CheckpointError(f"{info.path / 'config.json'}: {info.model_type} has no routed experts; nothing to place")
    first_name, first = next(iter(experts.items()))
    if first.has_bias or first.is_transposed or not first.is_concatenated or not first.has_gate:
        raise CheckpointError(f"{info.path / 'config.json'}: expert layout of {info.model_type} is not supported yet")
    text = config.get_text_config()
    rules = conversion_rules(info.model_type)
    layout = derive_layout(
        index,
        rules,
        {name: layer_of(name) for name in experts},
        num_experts=int(first.num_experts),  # type: ignore[arg-type]
        hidden=int(text.hidden_size),
        intermediate=int(first.down_proj.shape[-1]),  # type: ignore[union-attr]
    )
    _load_dense(model, index, rules, list(experts))
    model.eval()
    return LoadedModel(
        model=model, layout=layout, dtype=dtype, top_k=_top_k(text, first_name), activation=str(text.hidden_act)
    )


def _read_config(info: ModelInfo) -> Any:
    try:
        return AutoConfig.from_pretrained(info.path)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise CheckpointError(f"{info.path / 'config.json'}: transformers cannot read it: {reason}") from error


def _refuse_unsupported(info: ModelInfo, config: Any) -> None:
    if getattr(config, "quantization_config", None) is not None:
        method = config.quantization_config.get("quant_method", "unknown")
        raise CheckpointError(f"{info.path / 'config.json'}: quantization {method!r} is not supported yet")
    for kind in getattr(config.get_text_config(), "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(
                f"{info.path / 'config.json'}: layer type {kind!r} (linear or sparse attention) is not supported"
            )


def _compute_dtype(name: str, index: dict[str, TensorRef]) -> torch.dtype:
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    counts: dict[str, int] = {}
    for ref in index.values():
        counts[ref.dtype] = counts.get(ref.dtype, 0) + ref.num_bytes
    return torch.bfloat16 if max(counts, key=lambda kind: counts[kind]) == "BF16" else torch.float32


def _skeleton(info: ModelInfo, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=IMPLEMENTATION, experts_implementation=IMPLEMENTATION
            )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{info.path / 'config.json'}: transformers cannot build {info.model_type!r}: {error}"
        ) from error
    # Parameters come from the checkpoint; buffers (rotary frequencies) are computed, so they must be real.
    for module in model.modules():
        buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in buffers.items():
            module._buffers[name] = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
        if buffers:
            with torch.no_grad():
                model._init_weights(module)
    return model


def _load_dense(
    model: PreTrainedModel, index: dict[str, TensorRef], rules: ConversionRules, experts: list[str]
) -> None:
    parameters = {n: p for n, p in model.named_parameters(remove_duplicate=False) if not is_expert_key(n, experts)}
    persistent = {n: b for n, b in model.named_buffers() if n in model.state_dict()}
    wanted = parameters | persistent
    missing = set(wanted)
    for name, ref, value in _read_dense(index, rules, experts, set(wanted)):
        target = wanted[name]
        if tuple(target.shape) != ref.shape:
            raise CheckpointError(
                f"{ref.file}: tensor {ref.name} has shape {ref.shape}, expected {tuple(target.shape)}"
            )
        _assign(model, name, value.to(target.dtype), is_buffer=name in persistent)
        missing.discard(name)
    model.tie_weights()
    missing -= set(model.all_tied_weights_keys)
    if missing:
        first = sorted(missing)[0]
        where = next(iter(index.values())).file.parent if index else "checkpoint"
        raise CheckpointError(f"{where}: tensor {first} is missing ({len(missing)} missing in all)")


def _read_dense(
    index: dict[str, TensorRef], rules: ConversionRules, experts: list[str], wanted: set[str]
) -> Iterator[tuple[str, TensorRef, Tensor]]:
    """Values one by one; keys of experts and of parts the model does not have are skipped."""
    by_file: dict[Any, list[tuple[str, TensorRef]]] = {}
    for key, ref in index.items():
        name = rules.rename(key)
        if name in wanted and not is_expert_key(name, experts):
            by_file.setdefault(ref.file, []).append((name, ref))
    for file, entries in by_file.items():
        with _open(file) as tensors:
            for name, ref in entries:
                if ref.dtype not in _STORED:
                    raise CheckpointError(
                        f"{file}: tensor {ref.name} is stored as {ref.dtype}; one of F32, BF16, F16 is read"
                    )
                yield name, ref, tensors.get_tensor(ref.name).clone()


def _open(file: Path) -> Any:
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from error


def _assign(model: nn.Module, name: str, value: Tensor, *, is_buffer: bool) -> None:
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if is_buffer:
        parent._buffers[leaf] = value
    else:
        parent._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _top_k(text_config: Any, module: str) -> int:
    for field in ("num_experts_per_tok", "moe_topk", "num_selected_experts", "moe_top_k", "top_k_experts"):
        value = getattr(text_config, field, None)
        if isinstance(value, int):
            return value
    raise CheckpointError(f"config.json: no number of experts per token for {module}")
