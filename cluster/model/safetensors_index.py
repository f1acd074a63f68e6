"""Where each tensor of a checkpoint lies on disk. Knows headers and offsets; reads no weights.

Format: https://huggingface.co/docs/safetensors (8-byte header length, JSON header, data).
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

ITEM_BYTES = {"F32": 4, "BF16": 2, "F16": 2, "F64": 8, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U8": 1, "BOOL": 1,
              "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1}  # fmt: skip

_MAX_HEADER_BYTES = 100 * 2**20
_UNSUPPORTED = {"gguf": "GGUF", "awq": "AWQ", "gptq": "GPTQ", "compressed-tensors": "compressed-tensors"}


@dataclass(frozen=True, slots=True)
class TensorRef:
    """One tensor, or a contiguous part of one, as it lies in a file."""

    name: str
    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    num_bytes: int

    def row_slice(self, start: int, stop: int) -> TensorRef:
        """Rows [start, stop) along the first dim; contiguous because storage is row-major."""
        row = self.num_bytes // self.shape[0]
        shape = (stop - start, *self.shape[1:])
        return TensorRef(self.name, self.file, self.dtype, shape, self.offset + start * row, (stop - start) * row)

    def item(self, index: int) -> TensorRef:
        """Entry `index` along the first dim."""
        part = self.row_slice(index, index + 1)
        return TensorRef(self.name, self.file, self.dtype, self.shape[1:], part.offset, part.num_bytes)


def read_index(directory: Path) -> dict[str, TensorRef]:
    """Every tensor of the checkpoint by name.

    Raises:
        CheckpointError: no safetensors, a shard missing or truncated, a broken header; names the file.
    """
    single, index = directory / "model.safetensors", directory / "model.safetensors.index.json"
    if single.is_file():  # where both are, transformers reads this one
        return _read_header(single)
    if index.is_file():
        try:
            entries: dict[str, object] = json.loads(index.read_text())["weight_map"]
            weight_map = {name: str(shard) for name, shard in entries.items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index ({error})") from error
        tensors: dict[str, TensorRef] = {}
        for shard in sorted(set(weight_map.values())):
            if not (directory / shard).is_file():
                names = sorted(name for name, file in weight_map.items() if file == shard)
                raise CheckpointError(
                    f"{directory / shard}: shard is missing; it holds {names[0]} and {len(names) - 1} more"
                )
            tensors |= _read_header(directory / shard)
        for name, shard in weight_map.items():
            if name not in tensors:
                raise CheckpointError(f"{directory / shard}: tensor {name} is in {index.name} but not in the shard")
        return tensors
    for kind, label in _UNSUPPORTED.items():
        if any(directory.glob(f"*.{kind}")):
            raise CheckpointError(f"{directory}: {label} checkpoints are not supported; convert to safetensors")
    raise CheckpointError(f"{single}: file is missing; a model directory needs safetensors weights")


def _read_header(file: Path) -> dict[str, TensorRef]:
    size = file.stat().st_size
    try:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            if length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(f"{file}: truncated or not safetensors: header of {length} bytes, file of {size}")
            entries: dict[str, dict[str, Any]] = dict(json.loads(stream.read(length)).items())
    except (OSError, ValueError, AttributeError, struct.error) as error:
        raise CheckpointError(f"{file}: not a safetensors file ({error})") from error
    start = 8 + length
    tensors: dict[str, TensorRef] = {}
    for name, entry in entries.items():
        if name == "__metadata__":
            continue
        try:
            begin, end = (int(offset) for offset in entry["data_offsets"])
            dtype, shape = str(entry["dtype"]), tuple(int(dim) for dim in entry["shape"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise CheckpointError(f"{file}: tensor {name} has a broken header entry ({error})") from error
        if not 0 <= begin <= end or any(dim < 0 for dim in shape):
            raise CheckpointError(
                f"{file}: tensor {name} has a broken header entry (offsets {begin}:{end}, shape {shape})"
            )
        if start + end > size:
            raise CheckpointError(
                f"{file}: truncated: tensor {name} ends at byte {start + end}, the file at {size}; download it again"
            )
        if dtype in ITEM_BYTES and math.prod(shape) * ITEM_BYTES[dtype] != end - begin:
            raise CheckpointError(f"{file}: tensor {name}: shape {shape} of {dtype} does not fill {end - begin} bytes")
        tensors[name] = TensorRef(name, file, dtype, shape, start + begin, end - begin)
    return tensors
