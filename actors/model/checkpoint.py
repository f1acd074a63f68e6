"""Builds the model with its dense weights only; routed experts stay on the meta device.

Knows transformers' model classes and tensor names; knows nothing of batches. Raises CheckpointError
with file and tensor for everything that does not fit.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from actors.model.attention_layers import AttentionLayer, outline_attention
from actors.model.dense_weights import DenseSource, load_dense
from actors.model.quantization import fp8_block_size
from actors.model.seams import experts_modules, layer_of
from actors.model.skeleton import build_skeleton, read_config
from actors.weights.activation_functions import activation_of
from actors.weights.expert_layout import (
    ExpertLayout,
    ModuleForm,
    conversion_rules,
    derive_layout,
)
from cluster.errors import CheckpointError
from cluster.model.fingerprint import held_dtype
from cluster.model.info import ModelInfo
from cluster.model.safetensors_index import TensorRef, read_index

_STORED = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadedModel:
    """The dense part, ready to run, and where the experts are.

    attention: what each layer needs of the KV pages; empty when the dense weights were not loaded.
    problems: what is odd about the checkpoint though it can be served, in words.
    """

    model: PreTrainedModel
    layout: ExpertLayout
    dtype: torch.dtype
    top_k: int
    attention: tuple[AttentionLayer, ...]
    problems: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsShape:
    """The routed experts of a model: layer by module name, one of the modules, and their sizes."""

    modules: dict[str, int]
    first: nn.Module
    num_experts: int
    hidden: int
    intermediate: int


def experts_shape(model: PreTrainedModel) -> ExpertsShape | None:
    """What a model without weights says of its routed experts; None where it has none."""
    modules = experts_modules(model)
    if not modules:
        return None
    first = next(iter(modules.values()))
    return ExpertsShape(
        modules={name: layer_of(name) for name in modules},
        first=first,
        num_experts=int(first.num_experts),  # type: ignore[arg-type]
        hidden=int(model.config.get_text_config().hidden_size),
        intermediate=int(first.down_proj.shape[1 if first.is_transposed else 2]),  # type: ignore[union-attr]
    )


def load_model(info: ModelInfo, dtype_name: str, *, dense: bool = True) -> LoadedModel:
    """Build on meta, load dense weights, locate experts.

    Args:
        dtype_name: auto, bfloat16 or float32.
        dense: False leaves the dense weights on meta, for who only needs the experts.

    Raises:
        CheckpointError: missing or truncated shard, wrong shape, unsupported family; names file and tensor.
    """
    _refuse_files(info)
    config = read_config(info)
    fp8_block = fp8_block_size(info, config)
    index = read_index(info.path)
    dtype = _compute_dtype(dtype_name, index)
    model = build_skeleton(info, config, dtype)
    experts = experts_shape(model)
    if experts is None:
        raise CheckpointError(f"{info.path / 'config.json'}: {info.model_type} has no routed experts; nothing to place")
    text = config.get_text_config()
    top_k = top_k_of(text)
    rules = conversion_rules(info.model_type)
    layout = derive_layout(
        index,
        rules,
        experts.modules,
        num_experts=experts.num_experts,
        hidden=experts.hidden,
        intermediate=experts.intermediate,
        module_form=module_form(info, experts.first, fp8_block),
    )
    attention: tuple[AttentionLayer, ...] = ()
    problems: tuple[str, ...] = ()
    if dense:
        source = DenseSource(index=index, rules=rules, experts=tuple(experts.modules), fp8_block=fp8_block)
        problems = load_dense(model, source, layout)
        model.eval()
        attention = outline_attention(model, top_k=top_k)
    return LoadedModel(model=model, layout=layout, dtype=dtype, top_k=top_k, attention=attention, problems=problems)


def _refuse_files(info: ModelInfo) -> None:
    """Name the weights that are there, when they are not safetensors."""
    for suffix in (".gguf", ".bin", ".pt"):
        found = sorted(info.path.glob(f"*{suffix}"))
        if found and not any(info.path.glob("*.safetensors")):
            raise CheckpointError(f"{found[0]}: weights in {suffix} files are not supported; give safetensors")


def module_form(info: ModelInfo, experts: nn.Module, fp8_block: tuple[int, int] | None) -> ModuleForm:
    """What an experts module of transformers says of itself."""
    where, kind = info.path / "config.json", type(experts).__name__
    if not experts.has_gate or getattr(experts, "has_post_expert_norm", False):
        fact = "normalises the output of each expert" if experts.has_gate else "has no gate matrix"
        raise CheckpointError(f"{where}: {kind} {fact}; that is not supported")
    return ModuleForm(
        activation=activation_of(experts),
        transposed=bool(experts.is_transposed),
        interleaved=not experts.is_concatenated,
        has_bias=bool(experts.has_bias),
        fp8_block=fp8_block,
    )


def _compute_dtype(name: str, index: dict[str, TensorRef]) -> torch.dtype:
    counts: dict[str, int] = {}
    for ref in index.values():
        if not ref.name.endswith("_scale_inv"):
            counts[ref.dtype] = counts.get(ref.dtype, 0) + ref.num_bytes
    return {"bfloat16": torch.bfloat16, "float32": torch.float32}[held_dtype(name, counts)]


def top_k_of(text_config: Any) -> int:
    """Experts that a token chooses in a layer."""
    for field in ("num_experts_per_tok", "moe_topk", "moe_k", "num_selected_experts", "moe_top_k", "top_k_experts"):
        value = getattr(text_config, field, None)
        if isinstance(value, int):
            return value
    raise CheckpointError("config.json: no number of experts per token")
