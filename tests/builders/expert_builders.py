"""Synthetic expert checkpoints, byte by byte, so that a test decides where each matrix lies. No transformers."""

from __future__ import annotations

import json
import os
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from actors.experts.memory.arena import RamArena
from actors.experts.memory.disk import DiskLink
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore, LinkFactory
from actors.weights.activation_functions import Activation
from actors.weights.expert_layout import ConversionRules, ExpertLayout, derive_layout
from actors.weights.formats.base import TORCH_DTYPES
from actors.weights.formats.dense import DenseFormat
from actors.weights.formats.expert import ExpertForm, ExpertWeights
from actors.weights.reader import ExpertReader
from actors.weights.slots import SlotForm, held_expert_bytes
from cluster.errors import ExpertReadError
from cluster.model.safetensors_index import read_index
from cluster.policies.base import Scorer
from cluster.policies.eviction.lru import LruScorer
from cluster.types import ExpertId

HIDDEN, INTERMEDIATE = 40, 24

RULES = ConversionRules(
    renamings=(),
    merges=(
        (("mlp.experts.*.gate_proj.weight", "mlp.experts.*.up_proj.weight"), "mlp.experts.gate_up_proj"),
        (("mlp.experts.*.down_proj.weight",), "mlp.experts.down_proj"),
    ),
)

_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dense_form(dtype: torch.dtype, activation: str = "silu") -> ExpertForm:
    """Gate, up and down apart, row-major, without bias."""
    return ExpertForm(format=DenseFormat(dtype), activation=Activation(activation))


@dataclass(frozen=True, slots=True)
class Matrices:
    """The truth about one expert."""

    gate: Tensor
    up: Tensor
    down: Tensor

    def ffn(self, x: Tensor) -> Tensor:
        """Gated SiLU feed-forward of rows x, in float64."""
        x, gate, up, down = (t.double() for t in (x, self.gate, self.up, self.down))
        return (silu(x @ gate.T) * (x @ up.T)) @ down.T

    def weights(self) -> ExpertWeights:
        """As the store would hand it out."""
        return ExpertWeights.of(dense_form(self.gate.dtype), (self.gate, self.up, self.down))


@dataclass(frozen=True, slots=True)
class ExpertFile:
    """A checkpoint on disk and what is in it."""

    directory: Path
    layout: ExpertLayout
    experts: Mapping[ExpertId, Matrices]

    @property
    def file(self) -> Path:
        return self.directory / "model.safetensors"


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], *, shift: int = 0) -> None:
    """Tensors in the given order without gaps. Args: shift: bytes by which the data is moved off alignment."""
    header: dict[str, object] = {}
    at = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _NAMES.get(tensor.dtype, "I64"),
            "shape": list(tensor.shape),
            "data_offsets": [at, at + size],
        }
        at += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    with path.open("wb") as out:
        out.write(len(text).to_bytes(8, "little") + text)
        for tensor in tensors.values():
            out.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
        out.flush()
        os.fsync(out.fileno())  # dirty pages cannot be dropped from the page cache


def random_matrices(dtype: torch.dtype, *, hidden: int, intermediate: int, generator: torch.Generator) -> Matrices:
    """One expert with outputs of about the size of its inputs."""

    def matrix(rows: int, cols: int) -> Tensor:
        return (torch.randn(rows, cols, generator=generator) / cols**0.5).to(dtype)

    return Matrices(matrix(intermediate, hidden), matrix(intermediate, hidden), matrix(hidden, intermediate))


def write_experts(
    directory: Path,
    *,
    layers: int = 2,
    num_experts: int = 6,
    hidden: int = HIDDEN,
    intermediate: int = INTERMEDIATE,
    dtype: torch.dtype = torch.float32,
    shift: int = 0,
    adjacent: bool = True,
    seed: int = 0,
) -> ExpertFile:
    """Write random experts. Args: adjacent: matrices of one expert side by side, else all gates, all ups, all downs."""
    generator = torch.Generator().manual_seed(seed)
    experts = {
        ExpertId(layer, expert): random_matrices(dtype, hidden=hidden, intermediate=intermediate, generator=generator)
        for layer in range(layers)
        for expert in range(num_experts)
    }
    tensors = {
        f"model.layers.{e.layer}.mlp.experts.{e.expert}.{part}_proj.weight": getattr(matrices, part)
        for e, matrices in experts.items()
        for part in ("gate", "up", "down")
    }
    if not adjacent:
        tensors = {name: tensors[name] for part in ("gate", "up", "down") for name in tensors if f".{part}_" in name}
    directory.mkdir(parents=True, exist_ok=True)
    write_safetensors(directory / "model.safetensors", tensors, shift=shift)
    layout = derive_layout(
        read_index(directory),
        RULES,
        {f"model.layers.{layer}.mlp.experts": layer for layer in range(layers)},
        num_experts=num_experts,
        hidden=hidden,
        intermediate=intermediate,
    )
    return ExpertFile(directory, layout, experts)


def open_store(
    file: ExpertFile,
    *,
    slots: int,
    held_dtype: torch.dtype | None = None,
    min_experts: int = 1,
    io_threads: int = 2,
    direct_io: bool = True,
    wrap: Callable[[MemoryLink], MemoryLink] = lambda link: link,
    scorer: Scorer | None = None,
    first: LinkFactory | None = None,
    **kwargs: Any,
) -> ExpertStore:
    """A store with room for exactly `slots` experts.

    Args:
        wrap: what to put around the link from the disk. first: a link that is preferred to it.
    """
    held = held_dtype or TORCH_DTYPES[file.layout.stored_dtype]
    slot = held_expert_bytes(file.layout, held) // len(file.experts)
    form = SlotForm(file.layout, held)

    def disk(arena: RamArena) -> MemoryLink:
        return wrap(DiskLink(ExpertReader([file.file], direct_io=direct_io), form, arena))

    return ExpertStore(
        form,
        scorer or LruScorer(form.grid.size),
        [
            *([first] if first else []),
            lambda arena: wrap(DiskLink(ExpertReader([file.file], direct_io=direct_io), form, arena)),
        ],
        budget_bytes=slots * slot,
        min_experts=min_experts,
        io_threads=io_threads,
        **kwargs,
    )


class HeldLink:
    """Moves nothing until its gate is open, and fails for the experts in `broken`."""

    def __init__(self, link: MemoryLink) -> None:
        self.link, self.tier = link, link.tier
        self.gate = threading.Event()
        self.gate.set()
        self.broken: set[int] = set()
        self.loads: list[int] = []
        self.order: list[tuple[int, int]] = []

    def has(self, index: int) -> bool:
        return self.link.has(index)

    def num_chunks(self, index: int) -> int:
        return self.link.num_chunks(index)

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        if chunk == 0:
            self.loads.append(index)
        assert self.gate.wait(10)
        if index in self.broken:
            raise ExpertReadError(f"expert {index} is broken")
        return self.link.copy_chunk(index, chunk, slot)

    def close(self) -> None:
        self.link.close()


def dense_moe(
    experts: Mapping[ExpertId, Matrices], layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor
) -> Tensor:
    """The layer's routed output by its definition, one pair at a time, in float64."""
    out = torch.zeros(x_TD.shape, dtype=torch.float64)
    for t, ids in enumerate(ids_TK.tolist()):
        for k, expert in enumerate(ids):
            out[t] += weights_TK[t, k].double() * experts[ExpertId(layer, expert)].ffn(x_TD[t])
    return out


def random_routing(rows: int, top_k: int, experts: Sequence[int], generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Distinct experts for every row, with weights that sum to one."""
    pool = torch.tensor(list(experts))
    ids = torch.stack([pool[torch.randperm(len(pool), generator=generator)[:top_k]] for _ in range(rows)])
    return ids, torch.softmax(torch.randn(rows, top_k, generator=generator), dim=-1)
