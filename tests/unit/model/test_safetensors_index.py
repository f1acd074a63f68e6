"""Broken checkpoints are refused with the file's name, whatever their bytes."""

from __future__ import annotations

import json
import struct
from pathlib import Path
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from expert_builders import write_safetensors
from hypothesis import given, settings

from cluster.errors import CheckpointError
from cluster.model.safetensors_index import read_index

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}


def _write_header(path: Path, header: Any, data: bytes = b"\0" * 64) -> None:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def _write_sharded(directory: Path) -> Path:
    write_safetensors(directory / "one.safetensors", {"a": TENSORS["a"]})
    write_safetensors(directory / "two.safetensors", {"b": TENSORS["b"]})
    index = directory / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}))
    return index


def test_tensors_lie_where_the_index_says(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", TENSORS, shift=3)

    index = read_index(tmp_path)

    raw = (tmp_path / "model.safetensors").read_bytes()
    a, b = index["a"], index["b"]
    assert (a.dtype, a.shape, b.dtype, b.shape) == ("F32", (2, 3), "BF16", (4,))
    assert struct.unpack("<6f", raw[a.offset : a.offset + a.num_bytes]) == tuple(range(6))
    assert b.offset + b.num_bytes == len(raw)


def test_slices_lie_inside_their_tensor(tmp_path: Path) -> None:
    write_safetensors(tmp_path / "model.safetensors", {"w": torch.arange(24.0).view(2, 3, 4)})
    ref = read_index(tmp_path)["w"]

    rows = ref.item(1).row_slice(1, 3)

    raw = (tmp_path / "model.safetensors").read_bytes()
    assert rows.shape == (2, 4)
    assert struct.unpack("<8f", raw[rows.offset : rows.offset + rows.num_bytes]) == tuple(range(16, 24))


def test_of_one_file_and_an_index_the_file_is_read_as_transformers_does(tmp_path: Path) -> None:
    _write_sharded(tmp_path)
    write_safetensors(tmp_path / "model.safetensors", TENSORS)

    assert {ref.file.name for ref in read_index(tmp_path).values()} == {"model.safetensors"}


def test_shards_are_read_as_one(tmp_path: Path) -> None:
    _write_sharded(tmp_path)

    assert {name: ref.file.name for name, ref in read_index(tmp_path).items()} == {
        "a": "one.safetensors",
        "b": "two.safetensors",
    }


def test_missing_shard_is_named_with_what_it_holds(tmp_path: Path) -> None:
    _write_sharded(tmp_path)
    (tmp_path / "two.safetensors").unlink()

    with pytest.raises(CheckpointError, match=r"two\.safetensors: shard is missing; it holds b"):
        read_index(tmp_path)


def test_index_that_names_an_absent_tensor_is_refused(tmp_path: Path) -> None:
    index = _write_sharded(tmp_path)
    index.write_text(json.dumps({"weight_map": {"a": "one.safetensors", "c": "two.safetensors"}}))

    with pytest.raises(CheckpointError, match=r"two\.safetensors: tensor c"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": []}', '{"weight_map": {"a": 3}}', "null", "\ud800"]
)
def test_broken_index_is_named(tmp_path: Path, text: str) -> None:
    index = _write_sharded(tmp_path)
    index.write_bytes(text.encode("utf-8", "surrogatepass"))

    with pytest.raises(CheckpointError, match=r"index\.json|3: shard is missing"):
        read_index(tmp_path)


@pytest.mark.parametrize("keep", [0, 5, 8, 40, -1])
def test_truncated_file_is_refused(tmp_path: Path, keep: int) -> None:
    file = tmp_path / "model.safetensors"
    write_safetensors(file, TENSORS)
    file.write_bytes(file.read_bytes()[:keep])

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_index(tmp_path)


@pytest.mark.parametrize(
    "header",
    [
        b"\xff\xfe garbage",
        b"not json",
        b"[1, 2]",
        b"null",
        {"a": 3},
        {"a": {"dtype": "F32", "shape": [2]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [-4, 4]}},
        {"a": {"dtype": "F32", "shape": [-1, -2], "data_offsets": [0, 8]}},
        {"a": {"dtype": "F32", "shape": [2], "data_offsets": [100, 108]}},
        {"a": {"dtype": "F32", "shape": None, "data_offsets": [0, 8]}},
    ],
    ids=str,
)
def test_broken_header_is_refused(tmp_path: Path, header: Any) -> None:
    _write_header(tmp_path / "model.safetensors", header)

    with pytest.raises(CheckpointError, match=r"model\.safetensors"):
        read_index(tmp_path)


_JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**40), 2**40) | st.text(max_size=4) | st.floats(allow_nan=False),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=6,
)
_ENTRY = st.fixed_dictionaries(
    {}, optional={"dtype": _JSON | st.sampled_from(["F32", "X9"]), "shape": _JSON, "data_offsets": _JSON}
)


@settings(max_examples=30, deadline=None)
@given(header=_JSON | st.dictionaries(st.text(max_size=3), _ENTRY, max_size=3))
def test_any_header_is_read_or_refused(tmp_path_factory: pytest.TempPathFactory, header: Any) -> None:
    directory = tmp_path_factory.mktemp("header")
    _write_header(directory / "model.safetensors", header)

    try:
        index = read_index(directory)
    except CheckpointError:
        return
    size = (directory / "model.safetensors").stat().st_size
    assert all(8 <= ref.offset <= ref.offset + ref.num_bytes <= size for ref in index.values())


def test_other_formats_are_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "model.gguf").write_bytes(b"GGUF")

    with pytest.raises(CheckpointError, match="GGUF"):
        read_index(tmp_path)


def test_empty_directory_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.safetensors: file is missing"):
        read_index(tmp_path)
