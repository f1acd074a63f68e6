"""What a model's config.json alone says of its sizes: transformers builds it without weights, and shapes are counted.

Knows transformers' classes; reads no weights. So it is right for every family that can be served, and refuses the rest
with the server's own words.
"""

from __future__ import annotations

from typing import Any

import torch

from actors.model.checkpoint import experts_shape, module_form, top_k_of
from actors.model.quantization import FP8, fp8_block_size
from actors.model.skeleton import build_skeleton, read_config
from actors.weights.expert_layout import is_expert_key
from actors.weights.formats.base import TORCH_DTYPES, WeightFormat
from actors.weights.formats.dense import DenseFormat
from actors.weights.formats.expert import ExpertForm
from actors.weights.formats.fp8_block import Fp8BlockFormat
from actors.weights.formats.mxfp4 import Mxfp4Format
from actors.weights.reader import PAGE_BYTES
from cluster.errors import CheckpointError, ConfigError
from cluster.model.info import ModelInfo
from cluster.model.kv_budget import value_bytes, values_per_token
from cluster.model.sizing import ModelShape


def read_shape(info: ModelInfo, dtype_name: str) -> ModelShape:
    """Sizes of a model whose weights need not be there. Args: dtype_name: auto, bfloat16 or float32.

    Raises:
        CheckpointError: the family is not served; says why.
        ConfigError: config.json does not say how large a token is in the KV cache.
    """
    config = read_config(info)
    block = fp8_block_size(info, config)
    itemsize = value_bytes(info.config, dtype_name)
    dtype = torch.bfloat16 if itemsize == 2 else torch.float32
    model = build_skeleton(info, config, dtype)
    experts = experts_shape(model)
    if experts is None:
        raise CheckpointError(f"{info.path / 'config.json'}: {info.model_type} has no routed experts; nothing to place")
    values = values_per_token(info.config)
    if values is None:
        raise ConfigError(
            f"{info.path / 'config.json'}: layers of {info.model_type} keep different numbers of values, so the KV "
            f"cache is known only once the weights are loaded; start the server, and see /status"
        )
    names = list(experts.modules)
    form = ExpertForm(
        format=_format(config, block, _stored_dtype(info, dtype), dtype),
        activation=(says := module_form(info, experts.first, block)).activation,
        transposed=says.transposed and not _is_mxfp4(config),
        interleaved=says.interleaved,
        bias_dtype=dtype if says.has_bias else None,
    )
    dense = {n: p for n, p in model.named_parameters() if not is_expert_key(n, names)}
    tied = {name for name in model.all_tied_weights_keys if name in dense}
    return ModelShape(
        dense_bytes=sum(p.numel() * p.element_size() for n, p in dense.items() if n not in tied),
        token_bytes=values * itemsize,
        expert_bytes=_expert_bytes(form, experts.hidden, experts.intermediate),
        num_layers=len(experts.modules),
        num_experts=experts.num_experts,
        top_k=top_k_of(config.get_text_config()),
        context=info.max_model_len,
    )


def _is_mxfp4(config: Any) -> bool:
    settings = getattr(config, "quantization_config", None) or {}
    return bool(settings) and settings.get("quant_method") == "mxfp4"


def _stored_dtype(info: ModelInfo, held: torch.dtype) -> torch.dtype:
    """Of plain float weights; config.json's word for it, else what is computed in."""
    text = info.config.get("text_config", info.config)
    named = text.get("dtype") or text.get("torch_dtype")
    stored = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}.get(str(named), held)
    return stored if stored.itemsize <= held.itemsize else held  # never more bytes than stored


def _format(config: Any, block: tuple[int, int] | None, stored: torch.dtype, held: torch.dtype) -> WeightFormat:
    if _is_mxfp4(config):
        return Mxfp4Format()
    return DenseFormat(stored) if block is None else Fp8BlockFormat(*block, torch.float32)


def _expert_bytes(form: ExpertForm, hidden: int, intermediate: int) -> int:
    """Of one expert in memory, in whole pages; where it lies in its file may cost up to two pages more."""
    total = 0
    for part in form.part_names:
        count = 1
        for size in form.shape(part, hidden, intermediate):
            count *= size
        total += count * _itemsize(form, part)
    return -(-total // PAGE_BYTES) * PAGE_BYTES


def _itemsize(form: ExpertForm, part: str) -> int:
    if part.endswith("_bias"):
        assert form.bias_dtype is not None
        return form.bias_dtype.itemsize
    match form.format:
        case DenseFormat(dtype):
            return dtype.itemsize
        case Fp8BlockFormat() as packed:
            return packed.scale_dtype.itemsize if part.endswith("_scales") else TORCH_DTYPES[FP8].itemsize
        case _:
            return 1
