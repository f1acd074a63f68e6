"""What a fingerprint sees and what it may miss."""

from __future__ import annotations

import json
import os
import shutil
import struct
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from cluster.config.sections import ModelConfig
from cluster.errors import CheckpointError
from cluster.model.fingerprint import Mode, page_offsets, text_fingerprint
from cluster.model.info import read_model_info

_LAYERS, _ROWS = 6, 4096
_CONFIG = {"model_type": "qwen3_moe", "max_position_embeddings": 4096, "vocab_size": 512}
_NAMES = [f"model.layers.{layer}.mlp.experts.{expert}.w" for layer in range(_LAYERS) for expert in range(4)]


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


def _write(directory: Path, tensors: dict[str, np.ndarray], file: str = "model.safetensors", kind: str = "F32") -> Path:
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(_CONFIG))
    header, blobs, at = {}, [], 0
    for name, tensor in tensors.items():
        blob = tensor.tobytes()
        header[name] = {"dtype": kind, "shape": list(tensor.shape), "data_offsets": [at, at + len(blob)]}
        blobs.append(blob)
        at += len(blob)
    text = json.dumps(header).encode()
    (directory / file).write_bytes(struct.pack("<Q", len(text)) + text + b"".join(blobs))
    return directory


def _tensors(seed: int = 0) -> dict[str, np.ndarray]:
    random = np.random.default_rng(seed)
    return {name: random.random((_ROWS, 16), dtype=np.float32) for name in _NAMES}


def _fingerprint(directory: Path, mode: Mode = "sampled", dtype: str = "auto") -> str:
    return read_model_info(
        ModelConfig.model_validate({"path": str(directory), "fingerprint": mode, "dtype": dtype})
    ).fingerprint


def _change(directory: Path, offset: int, size: int = 1, file: str = "model.safetensors") -> None:
    """Other bytes in place: same name, size and, as a copy that keeps times would have it, same mtime."""
    path = directory / file
    before = path.stat()
    with path.open("r+b") as opened:
        opened.seek(offset)
        old = opened.read(size)
        opened.seek(offset)
        opened.write(bytes(255 - byte for byte in old))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def _data_start(directory: Path) -> int:
    return 8 + struct.unpack("<Q", (directory / "model.safetensors").read_bytes()[:8])[0]


def test_the_same_weights_have_the_same_fingerprint_wherever_they_are(tmp_path: Path) -> None:
    here = _write(tmp_path / "here", _tensors())
    copy = shutil.copytree(here, tmp_path / "copy")
    assert _fingerprint(here) == _fingerprint(copy)
    assert _fingerprint(here, "full") == _fingerprint(copy, "full")


@pytest.mark.parametrize("layer", range(_LAYERS))
def test_one_layers_tensors_make_another_model(tmp_path: Path, layer: int) -> None:
    changed = _tensors() | {n: t for n, t in _tensors(seed=1).items() if f"layers.{layer}." in n}
    first, second = _write(tmp_path / "a", _tensors()), _write(tmp_path / "b", changed)
    assert _fingerprint(first) != _fingerprint(second)


@pytest.mark.parametrize("eighth", range(8))
def test_a_changed_eighth_of_a_shard_is_sure_to_be_seen(tmp_path: Path, eighth: int) -> None:
    model = _write(tmp_path / "model", _tensors())
    before, start = _fingerprint(model), _data_start(model)
    length = ((model / "model.safetensors").stat().st_size - start) // 8
    _change(model, start + eighth * length, length)
    assert _fingerprint(model) != before


def test_samples_can_miss_a_small_change_and_full_does_not(tmp_path: Path) -> None:
    model = _write(tmp_path / "model", _tensors())
    sampled, full, size = _fingerprint(model), _fingerprint(model, "full"), (model / "model.safetensors").stat().st_size
    first, second = page_offsets("model.safetensors", _data_start(model), size)[:2]
    assert second > first + 4096
    _change(model, first + 4096)
    assert _fingerprint(model) == sampled  # the price of a start that doesn't read the weights
    assert _fingerprint(model, "full") != full


_CHANGES: dict[str, Callable[[Path], object]] = {
    "a new revision in the same folder": lambda model: _write(model, _tensors(seed=2)),
    "config.json": lambda model: (model / "config.json").write_text(json.dumps(_CONFIG | {"rope_theta": 1.0})),
    "the name of a tensor": lambda model: _write(model, {f"x{name}": t for name, t in _tensors().items()}),
    "a shape": lambda model: _write(model, {name: t.reshape(16, _ROWS) for name, t in _tensors().items()}),
    "another shard": lambda model: _write(model, _tensors(), file="model-2.safetensors"),
    "the index": lambda model: (model / "model.safetensors.index.json").write_text("{}"),
}


@pytest.mark.parametrize("change", _CHANGES)
def test_a_model_that_changes_under_a_running_process_has_another_fingerprint(tmp_path: Path, change: str) -> None:
    model = _write(tmp_path / "model", _tensors())
    before = {mode: _fingerprint(model, mode) for mode in ("sampled", "full")}
    _CHANGES[change](model)
    assert {mode: _fingerprint(model, mode) == old for mode, old in before.items()} == dict.fromkeys(before, False)


def test_the_dtype_held_counts_not_the_word_for_it(tmp_path: Path) -> None:
    model = _write(tmp_path / "model", _tensors())
    assert _fingerprint(model) == _fingerprint(model, dtype="float32") != _fingerprint(model, dtype="bfloat16")
    halved = _write(tmp_path / "bf16", {n: t.astype(np.float16) for n, t in _tensors().items()}, kind="BF16")
    assert _fingerprint(halved) == _fingerprint(halved, dtype="bfloat16") != _fingerprint(halved, dtype="float32")


def test_a_hub_caches_content_hashes_see_what_samples_miss(tmp_path: Path) -> None:
    def snapshot(name: str, blob: str) -> Path:
        model = _write(tmp_path / name, _tensors())
        (model / "blobs").mkdir()
        (model / "model.safetensors").rename(model / "blobs" / blob)
        (model / "model.safetensors").symlink_to(Path("blobs", blob))
        return model

    first, same, second = snapshot("a", "a" * 64), snapshot("b", "a" * 64), snapshot("c", "c" * 64)
    assert _fingerprint(first) == _fingerprint(same) != _fingerprint(second)


def test_what_was_hashed_once_is_remembered_until_the_file_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = _write(tmp_path / "model", _tensors())
    full = _fingerprint(model, "full")
    [entry] = (tmp_path / "cache" / "moesaic" / "fingerprints").iterdir()
    copy = shutil.copytree(model, tmp_path / "copy")  # another inode: nothing is known of it
    assert _fingerprint(copy, "full") == full
    assert entry.exists()
    _change(model, _data_start(model))
    assert _fingerprint(model, "full") != full


def test_without_a_cache_directory_it_is_only_slower(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(file))
    monkeypatch.setattr("tempfile.tempdir", str(file))
    model = _write(tmp_path / "model", _tensors())
    assert _fingerprint(model, "full") == _fingerprint(shutil.copytree(model, tmp_path / "copy"), "full")


def test_a_cache_that_others_may_write_to_is_not_believed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    places = tmp_path / "cache" / "moesaic" / "fingerprints"
    places.mkdir(parents=True)
    places.chmod(0o777)
    _fingerprint(_write(tmp_path / "model", _tensors()), "full")
    assert not list(places.iterdir())


def test_a_hundred_shards_take_under_a_second(tmp_path: Path) -> None:
    for number in range(100):
        _write(tmp_path / "model", {f"{n}.{number}": t[:64] for n, t in _tensors().items()}, f"{number}.safetensors")
    start_s = time.thread_time()
    _fingerprint(tmp_path / "model")
    assert time.thread_time() - start_s < 1.0


def test_damaged_files_are_left_to_whoever_loads_them(tmp_path: Path) -> None:
    model = _write(tmp_path / "model", _tensors())
    for content in (b"", b"\0" * 4, b"\xff" * 64, struct.pack("<Q", 3) + b"[1]", struct.pack("<Q", 4) + b"nope"):
        (model / "model.safetensors").write_bytes(content)
        assert len(_fingerprint(model)) == 16


def test_a_file_that_is_being_written_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = _write(tmp_path / "model", _tensors())

    def grow(_key: str) -> None:
        with (model / "model.safetensors").open("ab") as file:
            file.write(b"more")

    monkeypatch.setattr("cluster.model.fingerprint.recall", grow)
    with pytest.raises(CheckpointError, match="changed while they were read"):
        _fingerprint(model)


def test_tokenizer_and_template_have_one_of_their_own(tmp_path: Path) -> None:
    model = _write(tmp_path / "model", _tensors())
    before, weights = text_fingerprint(model), _fingerprint(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    assert text_fingerprint(model) != before
    assert _fingerprint(model) == weights
