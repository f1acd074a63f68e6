"""Compares the weights that a model holds with the bytes of its checkpoint, after everything was loaded and tied.

Small tensors whole, of large ones seeded samples: a wrong mapping, a tie that should not be or a wrong conversion shows
in any of them. Reads the file by itself, not by the loader's library. Knows tensors; knows no family.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn

from actors.model.quantization import FP8, dequantize_dense
from actors.weights.formats.base import TORCH_DTYPES
from cluster.errors import CheckpointError
from cluster.model.safetensors_index import TensorRef

_WHOLE_BYTES = 64 * 1024
_NUM_SAMPLES = 16
_SAMPLE_ITEMS = 256


def check_against_file(
    model: nn.Module,
    refs: Mapping[str, TensorRef],
    index: Mapping[str, TensorRef],
    fp8_block: tuple[int, int] | None,
    *,
    seed: int = 0,
) -> None:
    """Compare each weight of the model with where it is stored.

    Args:
        refs: by name of the model's parameter or buffer. index: where scales of FP8 weights are.
    Raises:
        CheckpointError: a weight is not what the file has, or has no values at all; names tensor and place.
    """
    rng = np.random.default_rng(seed)
    for name, ref in refs.items():
        held = _held(model, name)
        if held.is_meta or tuple(held.shape) != ref.shape:
            raise CheckpointError(f"{ref.file}: the model holds {name} as {_describe(held)}, the file as {ref.shape}")
        flat = held.reshape(-1)
        for start, expected in _samples(ref, index, fp8_block, rng):
            got = flat[start : start + expected.numel()]
            differs = ~torch.isclose(got, expected.to(got.dtype), rtol=0.0, atol=0.0, equal_nan=True)
            if bool(differs.any()):
                at = int(differs.nonzero()[0])
                raise CheckpointError(
                    f"{ref.file}: element {start + at} of tensor {ref.name} is {float(expected[at])} in the file, but "
                    f"the model holds {float(got[at])} as {name}; this is a fault of the loader or of the memory"
                )


def _held(model: nn.Module, name: str) -> Tensor:
    parent_name, _, leaf = name.rpartition(".")
    return getattr(model.get_submodule(parent_name), leaf)


def _samples(
    ref: TensorRef, index: Mapping[str, TensorRef], fp8_block: tuple[int, int] | None, rng: np.random.Generator
) -> list[tuple[int, Tensor]]:
    """(first element, values) of what is compared of one tensor."""
    num = math.prod(ref.shape)
    if num == 0:
        return []
    if ref.dtype == FP8:
        return [_fp8_rows(ref, index, fp8_block, rng)]
    item = ref.num_bytes // num
    dtype = TORCH_DTYPES[ref.dtype]
    if ref.num_bytes <= _WHOLE_BYTES:
        places = [(0, num)]
    else:
        starts = rng.integers(0, num - _SAMPLE_ITEMS + 1, _NUM_SAMPLES - 2).tolist()
        places = [(start, _SAMPLE_ITEMS) for start in (0, *starts, num - _SAMPLE_ITEMS)]
    with ref.file.open("rb") as stream:
        samples: list[tuple[int, Tensor]] = []
        for start, length in places:
            stream.seek(ref.offset + start * item)
            samples.append((start, torch.frombuffer(bytearray(stream.read(length * item)), dtype=dtype)))
    return samples


def _fp8_rows(
    ref: TensorRef, index: Mapping[str, TensorRef], fp8_block: tuple[int, int] | None, rng: np.random.Generator
) -> tuple[int, Tensor]:
    """One row of blocks, dequantised by itself."""
    assert fp8_block is not None, "the loader refuses FP8 without blocks"
    rows, cols = ref.shape
    block = int(rng.integers(-(-rows // fp8_block[0])))
    first = block * fp8_block[0]
    part = ref.row_slice(first, min(rows, first + fp8_block[0]))
    scales_name = f"{ref.name}_scale_inv"
    scales = replace(index[scales_name].row_slice(block, block + 1), name=scales_name)
    with part.file.open("rb") as stream:
        stream.seek(part.offset)
        codes = torch.frombuffer(bytearray(stream.read(part.num_bytes)), dtype=torch.float8_e4m3fn).view(part.shape)
    return first * cols, dequantize_dense(part, codes, {scales_name: scales}, fp8_block).reshape(-1)


def _describe(held: Tensor) -> str:
    return "nothing" if held.is_meta else str(tuple(held.shape))
