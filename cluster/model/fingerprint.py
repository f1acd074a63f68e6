"""What tells one model's weights from another's: a short hash of a directory, the same on every machine that has it.

Sampled (default): config.json, the index, name, size and header of every shard (names, shapes, dtypes of its tensors),
16 pages of 4 KiB of each, one in each sixteenth of it at a place that name and size decide, the content hashes that a
hub cache has, and the dtype held. Under a second for a hundred shards.

Sure to be seen: another config, another name, shape or dtype of any tensor, a file that is missing or longer, and any
run of changed bytes as long as an eighth of its shard. Fewer changed bytes (one expert, a row of the embeddings) may
lie between the pages: outside a hub cache, only `full`, which hashes all bytes, is sure to see them.

Knows files; knows no tensors, and nothing of what is done with the hash.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import struct
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from random import Random
from typing import Any, Literal, NamedTuple, TypeAlias, cast

from cluster.errors import CheckpointError
from cluster.model.fingerprint_cache import recall, remember

Mode: TypeAlias = Literal["sampled", "full"]

PAGE_BYTES, NUM_PAGES = 4096, 16

_HEX_DIGITS = 16
_MAX_HEADER_BYTES = 100 * 2**20  # the format's own bound
_HUB_BLOB = re.compile(r"[0-9a-f]{64}|[0-9a-f]{40}")  # SHA-256 of a large file, git's of a small one
_TEXT_FILES = ("*.json", "*.jinja", "*.model", "*.txt")
_WEIGHT_FLOATS = ("F32", "BF16", "F16")


class FileStamp(NamedTuple):
    """A file as it was when it was looked at; whoever writes to it or replaces it changes one of these."""

    path: str
    mtime_ns: int
    ctime_ns: int
    size: int
    inode: int


def model_fingerprint(
    directory: Path, config: Mapping[str, Any], *, dtype: str = "auto", mode: Mode = "sampled"
) -> str:
    """16 hexadecimal digits for the weights in `directory` as they are held.

    Args:
        config: content of config.json.
        dtype: as configured; auto counts as what it comes to.
    Raises:
        CheckpointError: the files changed while they were read, or cannot be read.
    """
    files = _weight_files(directory)
    try:
        held = held_dtype(dtype, _bytes_by_dtype(_stamps(files)))
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error
    whole = hashlib.sha256(json.dumps([config, held, mode], sort_keys=True).encode())
    whole.update(_digest(directory, files, mode).encode())
    return whole.hexdigest()[:_HEX_DIGITS]


def text_fingerprint(directory: Path) -> str:
    """The same for tokenizer, chat template and generation config: what front ends hold of a model."""
    found = sorted({file for pattern in _TEXT_FILES for file in directory.glob(pattern) if file.is_file()})
    return _digest(directory, found, "full")[:_HEX_DIGITS]


def held_dtype(dtype: str, bytes_by_dtype: Mapping[str, int]) -> str:
    """What `dtype` comes to. auto: bfloat16 where most bytes of the weights are, else float32.

    Args: bytes_by_dtype: by safetensors' name of the dtype; quantised weights are computed with in that of the others.
    """
    if dtype != "auto":
        return dtype
    counts = {"F32": 0} | {kind: size for kind, size in bytes_by_dtype.items() if kind in _WEIGHT_FLOATS}
    return "bfloat16" if max(counts, key=lambda kind: counts[kind]) == "BF16" else "float32"


def _weight_files(directory: Path) -> list[Path]:
    found = [*directory.glob("*.safetensors"), *directory.glob("*.safetensors.index.json")]
    return sorted(file for file in found if file.is_file())


def _stamps(files: Sequence[Path]) -> tuple[FileStamp, ...]:
    try:
        found = [(file, file.stat()) for file in files]
    except OSError as error:
        raise CheckpointError(f"{error.filename}: cannot be read: {error.strerror}") from error
    return tuple(FileStamp(str(f), s.st_mtime_ns, s.st_ctime_ns, s.st_size, s.st_ino) for f, s in found)


def _digest(directory: Path, files: Sequence[Path], mode: Mode) -> str:
    """Of the files' content, from memory or from disk where they have not changed since."""
    stamps = _stamps(files)
    try:
        digest = _remembered(stamps, mode)
    except OSError as error:
        raise CheckpointError(f"{error.filename or directory}: cannot be read: {error.strerror}") from error
    if _stamps(files) != stamps:
        raise CheckpointError(f"{directory}: its files changed while they were read; start when they are complete")
    return digest


@lru_cache(maxsize=64)
def _remembered(stamps: tuple[FileStamp, ...], mode: Mode) -> str:
    key = hashlib.sha256(repr((1, mode, stamps)).encode()).hexdigest()
    digest = recall(key)
    if digest is None:
        hashed = hashlib.sha256()
        for stamp in stamps:
            file = Path(stamp.path)
            is_sampled = mode == "sampled" and file.suffix == ".safetensors"
            content = _sampled(file, stamp.size) if is_sampled else _whole(file)
            hashed.update(f"{file.name}:{stamp.size}:".encode() + content)
        digest = hashed.hexdigest()
        remember(key, digest)
    return digest


def _whole(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


def _sampled(file: Path, size: int) -> bytes:
    hashed = hashlib.sha256(_hub_name(file).encode())
    with file.open("rb") as opened:
        start = 8 + _header_bytes(opened.read(8), size)
        opened.seek(0)
        hashed.update(opened.read(start))
        for offset in page_offsets(file.name, start, size):
            hashed.update(os.pread(opened.fileno(), PAGE_BYTES, offset))
    return hashed.digest()


def page_offsets(name: str, start: int, size: int) -> list[int]:
    """Where the pages of a file begin that are hashed: one in each of NUM_PAGES equal parts of [start, size)."""
    if size - start <= NUM_PAGES * PAGE_BYTES:
        return list(range(start, size, PAGE_BYTES))
    places = Random(f"{name}:{size}")  # its sequence is the same in every version of Python
    part = (size - start) // NUM_PAGES
    return [start + number * part + places.randrange(part - PAGE_BYTES + 1) for number in range(NUM_PAGES)]


def _header_bytes(first: bytes, size: int) -> int:
    """Length of a safetensors header; 0 of what is none: who loads it says what is wrong."""
    if len(first) < 8:
        return 0
    length = int(struct.unpack("<Q", first)[0])
    return length if length <= min(_MAX_HEADER_BYTES, size - 8) else 0


def _hub_name(file: Path) -> str:
    """The content's hash, where the file is one of a hub cache's snapshot: a link to a blob of that name."""
    if not file.is_symlink():
        return ""
    target = Path(os.readlink(file))
    return target.name if target.parent.name == "blobs" and _HUB_BLOB.fullmatch(target.name) else ""


@lru_cache(maxsize=64)
def _bytes_by_dtype(stamps: tuple[FileStamp, ...]) -> Mapping[str, int]:
    counts: dict[str, int] = {}
    for stamp in stamps:
        if not stamp.path.endswith(".safetensors"):
            continue
        with Path(stamp.path).open("rb") as opened:
            length = _header_bytes(opened.read(8), stamp.size)
            try:
                header: object = json.loads(opened.read(length)) if length else {}
            except ValueError:
                continue  # who loads it says what is wrong
        for name, tensor in cast("dict[str, Any]", header).items() if isinstance(header, dict) else ():
            if not isinstance(tensor, dict) or name.endswith("_scale_inv"):
                continue
            entry = cast("dict[str, Any]", tensor)
            match entry.get("data_offsets"), entry.get("dtype"):
                case [int(begin), int(end)], str(kind):
                    counts[kind] = counts.get(kind, 0) + end - begin
                case _:
                    continue
    return counts
