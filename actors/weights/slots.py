"""How one expert lies in a slot of an arena: where its matrices begin, in which dtype, and the views that compute.

Knows layouts and bytes; knows nothing of files' contents or of who is resident. Experts are flat indices of the grid.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import accumulate

import torch

from actors.weights.expert_layout import ExpertLayout
from actors.weights.formats.base import TORCH_DTYPES
from actors.weights.formats.expert import ExpertWeights, Matrices, matrices_of
from actors.weights.reader import PAGE_BYTES, ReadPlan, plan_read
from cluster.errors import ConfigError
from cluster.policies.signals import Grid
from cluster.types import ExpertId


class SlotForm:
    """One size fits all experts of a model. Plain floats may be held in another dtype than stored: `converts`.

    part_offsets: [N], where the matrices of each expert begin in its slot; what is equal is one object.
    """

    def __init__(self, layout: ExpertLayout, held_dtype: torch.dtype, *, top_k: int = 1) -> None:
        """Args: held_dtype: of plain float experts; packed formats are held as stored."""
        self.layout = layout
        self.held_dtype = held_dtype
        self.form = layout.form.held_as(held_dtype)
        self.converts = self.form != layout.form
        self.grid = Grid(tuple(layout.layers), layout.num_experts, top_k)
        plans = {expert: plan_read(tensors.parts) for expert, tensors in layout.experts.items()}
        self.slot_bytes = _slot_bytes(layout, held_dtype, plans)
        self.model_bytes = self.slot_bytes * len(plans)
        self._experts = [self.grid.expert(index) for index in range(self.grid.size)]
        self._plans = [plans[expert] for expert in self._experts]
        known: dict[tuple[int, ...], tuple[int, ...]] = {}
        made = (self._offsets_of(expert, plans[expert]) for expert in self._experts)
        self.part_offsets = [known.setdefault(offsets, offsets) for offsets in made]

    def num_slots(self, budget_bytes: int, min_experts: int, field: str) -> int:
        """Experts that a budget holds, at most all.

        Raises:
            ConfigError: fewer than `min_experts`; names the field and the minimum.
        """
        num_slots = min(budget_bytes // self.slot_bytes, self.grid.size)
        if num_slots < min_experts:
            raise ConfigError(
                f"config field {field}: {budget_bytes} bytes hold {num_slots} experts of {self.slot_bytes}, "
                f"one token's active experts are {min_experts}; the minimum is {min_experts * self.slot_bytes} bytes "
                f"({100 * min_experts / self.grid.size:.2f}% of {self.model_bytes})"
            )
        return num_slots

    def expert(self, index: int) -> ExpertId:
        """The expert at a flat index."""
        return self._experts[index]

    def files(self, index: int) -> tuple[str, ...]:
        """Where the expert is read from, each once, in order."""
        return tuple(sorted({str(part.file) for part in self.layout.experts[self._experts[index]].parts}))

    def plan(self, index: int) -> ReadPlan:
        """How the expert is read."""
        return self._plans[index]

    def convert(self, index: int, stored: memoryview, slot: memoryview) -> None:
        """Fill a slot from the expert as stored."""
        dtype = TORCH_DTYPES[self.layout.stored_dtype]
        parts = self.layout.experts[self._experts[index]].parts
        for part, offset, at in zip(parts, self._plans[index].part_offsets, self.part_offsets[index], strict=True):
            count = part.num_bytes // dtype.itemsize
            source = torch.frombuffer(stored, dtype=dtype, count=count, offset=offset)
            torch.frombuffer(slot, dtype=self.held_dtype, count=count, offset=at).copy_(source)

    def weights(self, index: int, slot: int, arena: memoryview) -> ExpertWeights:
        """Views of an expert in a slot of an arena; the same for all experts of equal `part_offsets`."""
        return ExpertWeights.of(self.form, self._tensors(index, slot, arena))

    def matrices(self, index: int, slot: int, arena: memoryview) -> Matrices:
        """Only the tensors of `weights`."""
        return matrices_of(self.form, self._tensors(index, slot, arena))

    def _tensors(self, index: int, slot: int, arena: memoryview) -> list[torch.Tensor]:
        base = slot * self.slot_bytes
        views: list[torch.Tensor] = []
        parts = self.layout.experts[self._experts[index]].parts
        for part, offset in zip(parts, self.part_offsets[index], strict=True):
            dtype = self.held_dtype if self.converts else TORCH_DTYPES[part.dtype]
            count = math.prod(part.shape)
            views.append(torch.frombuffer(arena, dtype=dtype, count=count, offset=base + offset).view(part.shape))
        return views

    def _offsets_of(self, expert: ExpertId, plan: ReadPlan) -> tuple[int, ...]:
        if not self.converts:
            return plan.part_offsets
        sizes = [math.prod(part.shape) * self.held_dtype.itemsize for part in self.layout.experts[expert].parts]
        return tuple(accumulate(sizes[:-1], initial=0))


def held_expert_bytes(layout: ExpertLayout, held_dtype: torch.dtype) -> int:
    """Bytes of all routed experts as held in memory, page alignment included: what 100% means."""
    plans = {expert: plan_read(tensors.parts) for expert, tensors in layout.experts.items()}
    return len(plans) * _slot_bytes(layout, held_dtype, plans)


def _slot_bytes(layout: ExpertLayout, held_dtype: torch.dtype, plans: Mapping[ExpertId, ReadPlan]) -> int:
    if layout.form.held_as(held_dtype) == layout.form:
        return max(plan.slot_bytes for plan in plans.values())
    parts = next(iter(layout.experts.values())).parts
    size = sum(math.prod(part.shape) for part in parts) * held_dtype.itemsize
    return -(-size // PAGE_BYTES) * PAGE_BYTES
