"""Safetensors files at the level of bytes: read headers, plan shards, write with aligned tensors.

Knows the file format (8-byte length, JSON header, tensors without holes) and byte counts. Does not
know what a tensor means, nor torch.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.errors import CheckpointError

PAGE_BYTES = 4096
INDEX_NAME = "model.safetensors.index.json"

_ITEM_BYTES = {"F64": 8, "I64": 8, "U64": 8, "F32": 4, "I32": 4, "U32": 4, "F16": 2, "BF16": 2, "I16": 2, "U16": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorEntry:
    """One tensor as a header tells it: its file, type, shape and size in bytes."""

    name: str
    path: Path
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class PlannedTensor:
    """One tensor to be written. Tensors of the same `unit` stay adjacent in one file."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    num_bytes: int
    unit: str


def read_entries(directory: Path) -> dict[str, TensorEntry]:
    """Every tensor of a checkpoint by name, from the index if there is one, else from all shards.

    Raises:
        CheckpointError: a shard is missing, cut short or not safetensors; names the file.
    """
    index = directory / INDEX_NAME
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise CheckpointError(f"{index}: not a safetensors index: {error!r}") from error
        paths = [directory / name for name in names]
    else:
        paths = sorted(directory.glob("*.safetensors"))
    if not paths:
        raise CheckpointError(f"{directory}: no *.safetensors file; only safetensors checkpoints can be converted")
    return {entry.name: entry for path in paths for entry in _read_header(path)}


def plan_shards(tensors: Iterable[PlannedTensor], *, max_shard_bytes: int) -> list[list[PlannedTensor]]:
    """Cut a sequence of tensors into files of bounded size; a unit larger than the bound gets its own."""
    shards: list[list[PlannedTensor]] = [[]]
    shard_bytes = 0
    for unit in _units(tensors):
        unit_bytes = sum(tensor.num_bytes for tensor in unit)
        if shards[-1] and shard_bytes + unit_bytes > max_shard_bytes:
            shards.append([])
            shard_bytes = 0
        shards[-1].extend(unit)
        shard_bytes += unit_bytes
    return shards


def order_loose_tensors(tensors: Iterable[PlannedTensor]) -> list[PlannedTensor]:
    """Whole pages first, so that they stay aligned; then by falling item size, so that items stay aligned."""
    return sorted(tensors, key=lambda t: (t.num_bytes % PAGE_BYTES != 0, -_ITEM_BYTES.get(t.dtype, 1), t.name))


def encode_header(tensors: Iterable[PlannedTensor], metadata: Mapping[str, str]) -> bytes:
    """Length and header, padded with spaces so that the data starts on a page."""
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    offset = 0
    for tensor in tensors:
        end = offset + tensor.num_bytes
        header[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header, separators=(",", ":")).encode()
    padded_bytes = -(-(8 + len(text)) // PAGE_BYTES) * PAGE_BYTES - 8
    return struct.pack("<Q", padded_bytes) + text.ljust(padded_bytes)


def shard_names(num_shards: int) -> list[str]:
    """File names as Hugging Face writes them."""
    if num_shards == 1:
        return ["model.safetensors"]
    return [f"model-{number:05d}-of-{num_shards:05d}.safetensors" for number in range(1, num_shards + 1)]


def write_index(directory: Path, shards: list[list[PlannedTensor]], names: list[str]) -> None:
    """The index that a checkpoint of more than one shard needs."""
    weight_map = {tensor.name: name for shard, name in zip(shards, names, strict=True) for tensor in shard}
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / INDEX_NAME).write_text(json.dumps(index, indent=1))


def _read_header(path: Path) -> Iterator[TensorEntry]:
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            (header_bytes,) = struct.unpack("<Q", file.read(8))
            if header_bytes > size - 8:
                raise CheckpointError(
                    f"{path}: header of {header_bytes} bytes in a file of {size}; the file is cut short"
                )
            header: dict[str, Any] = json.loads(file.read(header_bytes))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path}: shard is missing") from error
    except (OSError, ValueError, struct.error) as error:
        raise CheckpointError(f"{path}: not a safetensors file: {error}") from error
    for name, info in header.items():
        if name == "__metadata__":
            continue
        begin, end = info["data_offsets"]
        if 8 + header_bytes + end > size:
            raise CheckpointError(f"{path}: tensor {name} ends beyond the file of {size} bytes; the file is cut short")
        shape = tuple(info["shape"])
        yield TensorEntry(name=name, path=path, dtype=info["dtype"], shape=shape, num_bytes=end - begin)


def _units(tensors: Iterable[PlannedTensor]) -> Iterator[list[PlannedTensor]]:
    unit: list[PlannedTensor] = []
    for tensor in tensors:
        if unit and unit[-1].unit != tensor.unit:
            yield unit
            unit = []
        unit.append(tensor)
    if unit:
        yield unit
