"""Copies of the demo model with one thing wrong: links to what is whole, and a sparse file for damaged weights."""

from __future__ import annotations

import json
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEMO = Path(__file__).resolve().parents[2] / "models" / "moesaic-demo"
WEIGHTS = "model.safetensors"

Header = dict[str, Any]


def linked_demo(directory: Path, *, without: str) -> Path:
    """The demo model by symbolic links, except the file `without`."""
    directory.mkdir()
    for file in DEMO.iterdir():
        if file.name != without:
            (directory / file.name).symlink_to(file)
    return directory


def truncated(directory: Path) -> Path:
    """The last third of the weights is missing."""
    linked_demo(directory, without=WEIGHTS)
    size = (DEMO / WEIGHTS).stat().st_size
    _write_weights(directory / WEIGHTS, lambda _: None, size=2 * size // 3)
    return directory


def with_shape(directory: Path, tensor: str, shape: list[int]) -> Path:
    """`tensor` has another shape, of as many elements."""

    def change(header: Header) -> None:
        header[tensor]["shape"] = shape

    linked_demo(directory, without=WEIGHTS)
    _write_weights(directory / WEIGHTS, change)
    return directory


def without_tensor(directory: Path, tensor: str) -> Path:
    """`tensor` is not in the file; its bytes have another name."""

    def change(header: Header) -> None:
        header["renamed"] = header.pop(tensor)

    linked_demo(directory, without=WEIGHTS)
    _write_weights(directory / WEIGHTS, change)
    return directory


def with_hole(directory: Path, tensor: str) -> Path:
    """Bytes of the file belong to no tensor, which the format does not allow."""

    def change(header: Header) -> None:
        del header[tensor]

    linked_demo(directory, without=WEIGHTS)
    _write_weights(directory / WEIGHTS, change)
    return directory


def with_missing_shard(directory: Path, tensor: str, shard: str) -> Path:
    """An index of two shards, of which `shard`, with `tensor`, is not there."""
    linked_demo(directory, without=WEIGHTS)
    present = "model-00001-of-00002.safetensors"
    (directory / present).symlink_to(DEMO / WEIGHTS)
    names = [name for name in _read_header() if name != "__metadata__"]
    weight_map = {name: shard if name == tensor else present for name in names}
    (directory / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return directory


def with_config(directory: Path, **fields: Any) -> Path:
    """config.json with `fields` changed; None removes one."""
    linked_demo(directory, without="config.json")
    config = json.loads((DEMO / "config.json").read_text()) | fields
    kept = {name: value for name, value in config.items() if value is not None}
    (directory / "config.json").write_text(json.dumps(kept))
    return directory


def poisoned(checkpoint: Path, tensor: str, value: float, *, row: int | None = None) -> Path:
    """Write `value` (NaN, infinity) into a row of `tensor`, or into all of it; in place, other tensors stay."""
    from safetensors.torch import load_file, save_file

    tensors = load_file(checkpoint / WEIGHTS)
    tensors[tensor][slice(None) if row is None else row] = value
    save_file(tensors, checkpoint / WEIGHTS, metadata={"format": "pt"})
    return checkpoint


def _read_header() -> Header:
    with (DEMO / WEIGHTS).open("rb") as stream:
        (length,) = struct.unpack("<Q", stream.read(8))
        return json.loads(stream.read(length))


def _write_weights(file: Path, change: Callable[[Header], None], *, size: int | None = None) -> None:
    """A file with the demo's header, changed, and zeros for weights."""
    header = _read_header()
    data_bytes = max(entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__")
    change(header)
    text = json.dumps(header).encode()
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", len(text)) + text)
        stream.truncate(8 + len(text) + data_bytes if size is None else size)
