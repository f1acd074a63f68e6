"""Which quantised checkpoints are read as they are, and how their dense weights become floats at load.

Experts stay as stored (actors.weights.formats). Dense weights are dequantised once, to the model's dtype: a tensor's
stored dtype says whether it was quantised, so modules left out (`modules_to_not_convert`) need no list here.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from actors.weights.formats.base import FLOAT_DTYPES, TORCH_DTYPES, Matrix
from actors.weights.formats.fp8_block import Fp8BlockFormat
from cluster.errors import CheckpointError
from cluster.model.info import ModelInfo
from cluster.model.safetensors_index import TensorRef

FP8 = "F8_E4M3"


def fp8_block_size(info: ModelInfo, config: Any) -> tuple[int, int] | None:
    """Rows and columns of a block with one scale; None where nothing is FP8.

    Raises:
        CheckpointError: a quantisation that is not read, by name.
    """
    settings = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    where = info.path / "config.json"
    if settings is None:
        return None
    method = settings.get("quant_method", "unknown")
    if method == "mxfp4":
        return None
    if method != "fp8":
        raise CheckpointError(
            f"{where}: quantization {method!r} is not supported; fp8 (blocks), mxfp4 and unquantised weights are read"
        )
    match settings.get("weight_block_size"):
        case [int(rows), int(cols)]:
            return rows, cols
        case other:
            raise CheckpointError(
                f"{where}: quantization_config.weight_block_size is {other}; FP8 is read in blocks, such as [128, 128]"
            )


def dequantize_dense(
    ref: TensorRef, codes: Tensor, index: Mapping[str, TensorRef], block: tuple[int, int] | None
) -> Tensor:
    """A dense FP8 weight [N, D] as float32.

    Raises:
        CheckpointError: its scales are missing or do not fit; names file and tensor.
    """
    if block is None or len(ref.shape) != 2:
        raise CheckpointError(
            f"{ref.file}: tensor {ref.name} of shape {ref.shape} is FP8, but config.json has no "
            f"quantization_config.weight_block_size for it"
        )
    name = Fp8BlockFormat(*block).scales_name(ref.name)
    scales = index.get(name)
    if scales is None:
        raise CheckpointError(f"{ref.file}: tensor {name} is missing: the scales of {ref.name}")
    if scales.dtype not in FLOAT_DTYPES:
        raise CheckpointError(f"{scales.file}: tensor {name} is stored as {scales.dtype}; {FLOAT_DTYPES} are read")
    weights = Fp8BlockFormat(*block, TORCH_DTYPES[scales.dtype])
    if scales.shape != (expected := weights.scales_shape(*ref.shape)):
        raise CheckpointError(f"{scales.file}: tensor {name} has shape {scales.shape}, expected {expected}")
    return weights.dequantize(Matrix(codes, _read(scales)))


def _read(ref: TensorRef) -> Tensor:
    with ref.file.open("rb") as stream:
        stream.seek(ref.offset)
        data = bytearray(stream.read(ref.num_bytes))
    return torch.frombuffer(data, dtype=TORCH_DTYPES[ref.dtype]).view(ref.shape)
