"""Function-preserving widening: the same model with experts `factor` times as large.

Knows expert tensors by name (`experts.E.{gate,up,down}_proj`, Mixtral's `experts.E.{w1,w3,w2}`) and
which config field holds their width. Does not know the
arithmetic (`neurons.py`) nor the file format (`safetensors_files.py`).
"""

from __future__ import annotations

import contextlib
import json
import re
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.convert.neurons import widen_mlp
from actors.convert.safetensors_files import (
    INDEX_NAME,
    PlannedTensor,
    TensorEntry,
    encode_header,
    order_loose_tensors,
    plan_shards,
    read_entries,
    shard_names,
    write_index,
)
from cluster.errors import CheckpointError, ConfigError

if TYPE_CHECKING:
    import torch

_MATRIX = re.compile(
    r"^(?P<stem>(?:.*\.)?(?:experts\.(?P<expert>\d+)|shared_experts))"
    r"\.(?P<role>gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$"
)
_LAYER = re.compile(r"(?:^|\.)layers\.(\d+)\.")
_DENSE_MLP = re.compile(r"\.(?:mlp|feed_forward|shared_expert|shared_mlp)\.(?:gate_proj|up_proj|down_proj)\.weight$")
_ROLES = {"gate_proj": "gate", "up_proj": "up", "down_proj": "down", "w1": "gate", "w3": "up", "w2": "down"}
_ROLE_ORDER = ("gate", "up", "down")
_FLOATS = ("F32", "BF16", "F16")
_COPIED = ("*.json", "*.jinja", "*.model", "*.txt", "*.tiktoken", "LICENSE*")


@dataclass(frozen=True, slots=True, kw_only=True)
class WidenReport:
    """What was written. `max_residual` is the largest relative change of a down-projection's sum, 0 if exact."""

    path: Path
    factor: int
    num_experts: int
    expert_bytes: int
    total_bytes: int
    num_shards: int
    max_residual: float


@dataclass(frozen=True, slots=True, kw_only=True)
class _Mlp:
    """The three matrices of one gated MLP to widen. `index` is (layer, expert); shared experts have expert -1."""

    stem: str
    index: tuple[int, int]
    by_role: Mapping[str, TensorEntry]


def widen_checkpoint(
    src: Path,
    dst: Path,
    *,
    factor: int,
    seed: int = 0,
    max_shard_bytes: int = 4 * 2**30,
    on_progress: Callable[[int, int], None] | None = None,
) -> WidenReport:
    """Write a copy of checkpoint `src` to `dst` whose experts are `factor` times as wide.

    Works on one expert at a time. `dst` appears only when it is complete. `on_progress` gets bytes
    written so far and in total.

    Raises:
        ConfigError: `dst` exists, `factor` is below 1, or the disk has too little room.
        CheckpointError: not a checkpoint this can widen; names the file and the tensor or field.
    """
    if factor < 1:
        raise ConfigError(f"factor {factor}: must be at least 1")
    if dst.exists():
        raise ConfigError(f"{dst}: exists already; remove it or choose another name")
    config, field = _load_config(src)
    entries = read_entries(src)
    mlps = _find_mlps(src, entries, config, field)
    shards = plan_shards(_plan_tensors(entries, mlps, factor), max_shard_bytes=max_shard_bytes)
    total = sum(tensor.num_bytes for shard in shards for tensor in shard)
    writer = _ShardWriter(entries, mlps, factor, seed, total, on_progress)
    partial = dst.with_name(dst.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)  # left by a conversion that was killed
    partial.mkdir(parents=True)
    try:
        free = shutil.disk_usage(partial).free
        if free < total:
            raise ConfigError(f"{dst}: the copy needs {total} bytes, the disk has {free} free")
        writer.write_all(partial, shards)
        _copy_other_files(src, partial)
        widened = _widened_config(config, field, factor)
        (partial / "config.json").write_text(json.dumps(widened, indent=2) + "\n")
        partial.rename(dst)
    except BaseException:  # also an interrupt: nothing half-written stays behind
        shutil.rmtree(partial, ignore_errors=True)
        raise
    experts = [mlp for mlp in mlps.values() if mlp.index[1] >= 0]
    return WidenReport(
        path=dst,
        factor=factor,
        num_experts=len(experts),
        expert_bytes=factor * sum(entry.num_bytes for mlp in experts for entry in mlp.by_role.values()),
        total_bytes=total,
        num_shards=len(shards),
        max_residual=writer.max_residual,
    )


def _load_config(src: Path) -> tuple[dict[str, Any], str]:
    """config.json and the name of the field that holds the experts' width."""
    path = src / "config.json"
    try:
        config: dict[str, Any] = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from error
    text = config.get("text_config", config)
    if "quantization_config" in config or "quantization_config" in text:
        raise CheckpointError(f"{path}: quantization_config is set; only unquantised checkpoints can be widened")
    field = "moe_intermediate_size" if text.get("moe_intermediate_size") is not None else "intermediate_size"
    if not isinstance(text.get(field), int):
        raise CheckpointError(f"{path}: neither moe_intermediate_size nor intermediate_size is a number")
    return config, field


def _widened_config(config: dict[str, Any], field: str, factor: int) -> dict[str, Any]:
    text = config.get("text_config", config)
    changed = {**text, field: text[field] * factor}
    return {**config, "text_config": changed} if "text_config" in config else changed


def _find_mlps(src: Path, entries: Mapping[str, TensorEntry], config: dict[str, Any], field: str) -> dict[str, _Mlp]:
    """The MLPs whose width is `field`, by stem: all routed experts, and DeepSeek-like shared ones."""
    text = config.get("text_config", config)
    found: dict[str, dict[str, TensorEntry]] = {}
    indices: dict[str, tuple[int, int]] = {}
    for name, entry in entries.items():
        match = _MATRIX.match(name)
        if match is None:
            continue
        found.setdefault(match["stem"], {})[_ROLES[match["role"]]] = entry
        layer = _LAYER.search(name)
        indices[match["stem"]] = (int(layer[1]) if layer else 0, int(match["expert"] or -1))
    mlps = {stem: _Mlp(stem=stem, index=indices[stem], by_role=by_role) for stem, by_role in found.items()}
    if not any(mlp.index[1] >= 0 for mlp in mlps.values()):
        raise CheckpointError(
            f"{src}: no tensors named experts.E.gate_proj or experts.E.w1; "
            "dense models and checkpoints with fused experts cannot be widened"
        )
    for mlp in mlps.values():
        _check_mlp(mlp, width=text[field], field=field)
    for name in entries:
        in_expert = ".experts." in name and _MATRIX.match(name) is None
        if in_expert:
            raise CheckpointError(f"{entries[name].path}: tensor {name}: experts with bias or scales cannot be widened")
        if field == "intermediate_size" and _DENSE_MLP.search(name):
            raise CheckpointError(
                f"{entries[name].path}: tensor {name} is a dense MLP, and config.json has one intermediate_size "
                "for dense MLPs and experts; this checkpoint cannot be widened"
            )
    return mlps


def _check_mlp(mlp: _Mlp, *, width: int, field: str) -> None:
    for role in _ROLE_ORDER:
        entry = mlp.by_role.get(role)
        if entry is None:
            raise CheckpointError(f"{mlp.stem}: the {role} matrix is missing from the checkpoint")
        if entry.dtype not in _FLOATS:
            raise CheckpointError(f"{entry.path}: tensor {entry.name} is {entry.dtype}; widening needs {_FLOATS}")
        neurons = entry.shape[1 if role == "down" else 0] if len(entry.shape) == 2 else 0
        is_expert = mlp.index[1] >= 0
        if neurons != width if is_expert else neurons == 0 or neurons % width:
            raise CheckpointError(f"{entry.path}: tensor {entry.name} has shape {entry.shape}, but {field} is {width}")


def _plan_tensors(entries: Mapping[str, TensorEntry], mlps: Mapping[str, _Mlp], factor: int) -> list[PlannedTensor]:
    """Experts first, by layer and expert, the three matrices of one together; then everything else."""
    experts: list[PlannedTensor] = []
    loose: list[PlannedTensor] = []
    planned: set[str] = set()
    for mlp in sorted(mlps.values(), key=lambda mlp: (mlp.index, mlp.stem)):
        for role in _ROLE_ORDER:
            entry = mlp.by_role[role]
            rows, columns = entry.shape
            shape = (rows, columns * factor) if role == "down" else (rows * factor, columns)
            is_expert = mlp.index[1] >= 0
            unit = mlp.stem if is_expert else entry.name
            (experts if is_expert else loose).append(_planned(entry, shape, entry.num_bytes * factor, unit))
            planned.add(entry.name)
    loose += [_planned(e, e.shape, e.num_bytes, e.name) for e in entries.values() if e.name not in planned]
    return experts + order_loose_tensors(loose)


def _planned(entry: TensorEntry, shape: tuple[int, ...], num_bytes: int, unit: str) -> PlannedTensor:
    return PlannedTensor(name=entry.name, dtype=entry.dtype, shape=shape, num_bytes=num_bytes, unit=unit)


class _ShardWriter:
    """Writes planned tensors, widening an expert when its first matrix comes up."""

    def __init__(
        self,
        entries: Mapping[str, TensorEntry],
        mlps: Mapping[str, _Mlp],
        factor: int,
        seed: int,
        total_bytes: int,
        on_progress: Callable[[int, int], None] | None,
    ) -> None:
        self._entries = entries
        self._mlp_by_tensor = {e.name: (mlp, role) for mlp in mlps.values() for role, e in mlp.by_role.items()}
        self._factor = factor
        self._seed = seed
        self._total_bytes = total_bytes
        self._on_progress = on_progress
        self._written = 0
        self._current: tuple[str, dict[str, torch.Tensor]] = ("", {})
        self.max_residual = 0.0

    def write_all(self, directory: Path, shards: list[list[PlannedTensor]]) -> None:
        """Every shard, and the index if there is more than one."""
        names = shard_names(len(shards))
        for name, shard in zip(names, shards, strict=True):
            self._write(directory / name, shard)
        if len(shards) > 1:
            write_index(directory, shards, names)

    def _write(self, path: Path, tensors: list[PlannedTensor]) -> None:
        metadata = {"format": "pt", "moesaic_widen_factor": str(self._factor)}
        with contextlib.ExitStack() as stack, path.open("wb") as file:
            handles: dict[Path, Any] = {}
            file.write(encode_header(tensors, metadata))
            for planned in tensors:
                tensor = self._tensor(planned, stack, handles)
                if tuple(tensor.shape) != planned.shape:
                    raise AssertionError(f"{planned.name}: wrote {tuple(tensor.shape)}, planned {planned.shape}")
                file.write(_raw_bytes(tensor))
                self._written += planned.num_bytes
                if self._on_progress is not None:
                    self._on_progress(self._written, self._total_bytes)

    def _tensor(self, planned: PlannedTensor, stack: contextlib.ExitStack, handles: dict[Path, Any]) -> torch.Tensor:
        if planned.name not in self._mlp_by_tensor:
            return _read(self._entries[planned.name], stack, handles)
        mlp, role = self._mlp_by_tensor[planned.name]
        if self._current[0] != mlp.stem:
            matrices = {role: _read(entry, stack, handles) for role, entry in mlp.by_role.items()}
            widened, residual = widen_mlp(matrices, factor=self._factor, seed=_mixed_seed(self._seed, mlp.index))
            self.max_residual = max(self.max_residual, residual)
            self._current = (mlp.stem, widened)
        return self._current[1][role]


def _mixed_seed(seed: int, index: tuple[int, int]) -> int:
    layer, expert = index
    return ((seed * 1_000_003 + layer) * 1_000_003 + expert) % 2**63


def _read(entry: TensorEntry, stack: contextlib.ExitStack, handles: dict[Path, Any]) -> torch.Tensor:
    from safetensors import safe_open

    if entry.path not in handles:
        handles[entry.path] = stack.enter_context(safe_open(entry.path, framework="pt"))
    return handles[entry.path].get_tensor(entry.name)


def _raw_bytes(tensor: torch.Tensor) -> memoryview:
    import torch

    return tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data


def _copy_other_files(src: Path, dst: Path) -> None:
    for pattern in _COPIED:
        for path in src.glob(pattern):
            if path.is_file() and path.name not in ("config.json", INDEX_NAME):
                shutil.copy2(path, dst / path.name)
