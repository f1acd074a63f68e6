"""Builds a transformers model without weights, or says by name why it cannot be served.

Knows transformers' configurations and model classes; reads no tensor.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from torch import nn
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.model.seams import IMPLEMENTATION, register_seams
from cluster.errors import CheckpointError
from cluster.model.info import ModelInfo

_OTHER_ATTENTION = re.compile(r"Indexer|Mamba|DeltaNet|DeltaAttention|LightningAttention|ShortConv|Recurrent")


def read_config(info: ModelInfo) -> Any:
    """transformers' configuration of the model.

    Raises:
        CheckpointError: transformers does not know it, it is no text model, or it has layers without softmax attention.
    """
    where = info.path / "config.json"
    try:
        config = AutoConfig.from_pretrained(info.path)
    except Exception as error:
        raise CheckpointError(f"{where}: transformers cannot read it: {_first_line(error)}") from error
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"{where}: transformers has no text generation model {config.model_type!r} (is it multimodal?)"
        )
    for kind in getattr(config.get_text_config(), "layer_types", None) or ():
        if kind not in ("full_attention", "sliding_attention"):
            raise CheckpointError(f"{where}: layer type {kind!r} (linear or sparse attention) is not supported")
    return config


def build_skeleton(info: ModelInfo, config: Any, dtype: torch.dtype) -> PreTrainedModel:
    """The model with parameters on the meta device and computed buffers.

    Raises:
        CheckpointError: no such model class, or its attention is not softmax attention.
    """
    register_seams()
    where = info.path / "config.json"
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config, dtype=dtype, attn_implementation=IMPLEMENTATION, experts_implementation=IMPLEMENTATION
            )
    except (ValueError, KeyError, TypeError) as error:
        raise CheckpointError(
            f"{where}: transformers cannot build {info.model_type!r}: {_first_line(error)}"
        ) from error
    for name, module in model.named_modules():
        kind = type(module).__name__
        if _OTHER_ATTENTION.search(kind) or isinstance(module, nn.Conv1d):
            raise CheckpointError(
                f"{where}: {info.model_type} has linear or sparse attention ({name} is a {kind}); that is not supported"
            )
    if getattr(model.config.get_text_config(), "output_router_logits", False):
        model.config.get_text_config().output_router_logits = False  # only a training loss is computed of them
    _keep_in_float32(model)
    _compute_buffers(info, model)
    return model


def set_tensor(model: nn.Module, name: str, value: torch.Tensor, *, is_buffer: bool) -> None:
    """Put `value` where the model has the parameter or buffer `name`."""
    parent_name, _, leaf = name.rpartition(".")
    parent = model.get_submodule(parent_name)
    if is_buffer:
        parent._buffers[leaf] = value
    else:
        parent._parameters[leaf] = nn.Parameter(value, requires_grad=False)


def _keep_in_float32(model: PreTrainedModel) -> None:
    """Honour the modules whose values transformers keeps in float32 whatever the dtype (gate biases, mostly)."""
    patterns = [re.compile(pattern.replace("*", ".*")) for pattern in model._keep_in_fp32_modules_strict or ()]
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if value.is_meta and value.is_floating_point() and any(pattern.search(name) for pattern in patterns):
            is_buffer = not isinstance(value, nn.Parameter)
            set_tensor(model, name, torch.empty_like(value, dtype=torch.float32), is_buffer=is_buffer)


def _compute_buffers(info: ModelInfo, model: PreTrainedModel) -> None:
    """Parameters come from the checkpoint; buffers (rotary frequencies) are computed, so they must be real."""
    persistent = set(model.state_dict())
    for prefix, module in model.named_modules():
        buffers = {name: b for name, b in module._buffers.items() if b is not None and b.is_meta}
        for name, buffer in buffers.items():
            real = torch.zeros(buffer.shape, dtype=buffer.dtype, device="cpu")
            module._buffers[name] = real.fill_(torch.nan) if real.is_floating_point() else real
        if buffers:
            with torch.no_grad():
                model._init_weights(module)
        for name in buffers:
            full = f"{prefix}.{name}" if prefix else name
            if full not in persistent and bool(module._buffers[name].isnan().any()):  # type: ignore[union-attr]
                raise CheckpointError(
                    f"{info.path / 'config.json'}: transformers computes {full} of {info.model_type} nowhere that is "
                    f"known here; this family is not supported"
                )


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]
