"""The expert memory of one process: a bounded arena, filled from disk on demand.

Knows bytes, slots and states; knows nothing of layers' mathematics. One thread (the engine's)
acquires; the reader's threads only fill slots handed to them. The budget is never exceeded: it is
the arena's size, and an expert is written nowhere else.
"""

from __future__ import annotations

import math
import mmap
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
import torch
from torch import Tensor

from actors.experts.formats.base import TORCH_DTYPES
from actors.experts.formats.expert import ExpertWeights
from actors.experts.policies.base import EvictionPolicy
from actors.experts.reader import PAGE_BYTES, ExpertReader, ReadPlan, plan_read
from actors.model.expert_layout import ExpertLayout
from cluster.errors import ConfigError
from cluster.types import ExpertId, LayerExperts, Phase


@dataclass(slots=True)
class StoreCounters:
    """Since start. hits and misses count experts asked for, once per layer and step."""

    hits: int = 0
    misses: int = 0
    stall_s: float = 0.0


class ExpertStore:
    """Experts by id within a byte budget, least valuable evicted first."""

    def __init__(
        self,
        layout: ExpertLayout,
        reader: ExpertReader,
        policy: EvictionPolicy,
        *,
        budget_bytes: int,
        held_dtype: torch.dtype,
        min_experts: int,
        io_threads: int = 3,
    ) -> None:
        """Args: held_dtype: as plain float experts are held; converted on the way in if stored otherwise. Packed
        formats are held as stored.

        Raises:
            ConfigError: the budget does not hold `min_experts`; says the minimum.
        """
        self.layout = layout
        self.held_dtype = held_dtype
        self.counters = StoreCounters()
        self._reader = reader
        self._policy = policy
        self._plans: dict[ExpertId, ReadPlan] = {e: plan_read(t.parts) for e, t in layout.experts.items()}
        self.form = layout.form.held_as(held_dtype)
        self._converts = self.form != layout.form
        self.slot_bytes = _slot_size(layout, held_dtype, self._plans)
        self.model_bytes = self.slot_bytes * len(self._plans)
        num_slots = min(budget_bytes // self.slot_bytes, len(self._plans))
        if num_slots < min_experts:
            raise ConfigError(
                f"config field experts.cache: {budget_bytes} bytes hold {num_slots} experts of {self.slot_bytes}, "
                f"one token's active experts are {min_experts}; the minimum is {min_experts * self.slot_bytes} bytes "
                f"({100 * min_experts / len(self._plans):.2f}% of {self.model_bytes})"
            )
        self.num_slots = num_slots
        self.budget_bytes = budget_bytes
        # Private: huge pages are not given to shared memory, and they save a fifth of the time to stream weights.
        self._arena = mmap.mmap(-1, num_slots * self.slot_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._arena.madvise(mmap.MADV_HUGEPAGE)
        self._view = memoryview(self._arena)
        self._free: list[int] = list(range(num_slots - 1, -1, -1))
        self._slots: dict[ExpertId, int] = {}
        self._weights: dict[ExpertId, ExpertWeights] = {}
        self._pinned: set[ExpertId] = set()
        self._ahead: dict[ExpertId, tuple[Future[None], int]] = {}
        self._resident = {layer: np.zeros(layout.num_experts, dtype=bool) for layer in layout.layers}
        self._layer_hits = dict.fromkeys(layout.layers, 0)
        self._layer_misses = dict.fromkeys(layout.layers, 0)
        self._io = ThreadPoolExecutor(io_threads, thread_name_prefix="expert-io")

    @property
    def bytes_read(self) -> int:
        return self._reader.bytes_read

    @property
    def read_mode(self) -> str:
        return self._reader.mode

    @property
    def num_resident(self) -> int:
        return len(self._weights)

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, ExpertWeights]]]:
        """Yield the wanted experts in groups as they become ready: resident ones first.

        A group is pinned until the next one is asked for. With fewer slots than experts wanted, the
        rest is loaded as earlier groups are done.

        Raises:
            ExpertReadError: a load failed; nothing stays pinned.
        """
        self.take_in_ahead()
        resident: list[int] = []
        missing: list[ExpertId] = []
        for e in experts:
            if (layer, e) in self._weights:
                resident.append(e)
            else:
                missing.append(ExpertId(layer, e))
        self.counters.hits += len(resident)
        self.counters.misses += len(missing)
        self._layer_hits[layer] += len(resident)
        self._layer_misses[layer] += len(missing)
        if not missing:
            yield self._use(layer, resident)
            return
        if any(expert in self._ahead for expert in missing):
            self.take_in_ahead(wait_for_it=True)
            missing = [expert for expert in missing if expert not in self._weights]
            resident = [e for e in experts if ExpertId(layer, e) in self._weights]
        self._pinned.update(ExpertId(layer, e) for e in resident)
        loading: dict[Future[None], tuple[ExpertId, int]] = {}
        try:
            self._start_loads(missing, loading)
            if resident:
                yield self._use(layer, resident)
                self._pinned.difference_update(ExpertId(layer, e) for e in resident)
                self._start_loads(missing, loading)
            while loading:
                ready = self._wait(loading)
                yield self._use(layer, [e.expert for e in ready])
                self._pinned.difference_update(ready)
                self._start_loads(missing, loading)
        finally:
            self._settle(loading)
            self._pinned.clear()

    def resident(self, layer: int) -> np.ndarray:
        """(num_experts,) bool: which experts of a layer are resident; a live view, for the acquiring thread."""
        return self._resident[layer]

    def load_ahead(self, expert: ExpertId, *, replaces: Callable[[ExpertId], bool]) -> bool:
        """Begin to load an expert that nobody waits for, one at a time; False if there is no room for it.

        Args:
            replaces: whether the expert is worth more than this one, which would be evicted.
        """
        if self._ahead or expert in self._weights:
            return False
        if not self._free:
            victim = self._policy.choose_victim(self._pinned)
            if victim is None or not replaces(victim):
                return False
        slot = self._take_slot()
        if slot is None:
            return False
        self._ahead[expert] = (self._io.submit(self._load, expert, slot), slot)
        return True

    def take_in_ahead(self, *, wait_for_it: bool = False) -> None:
        """Make resident what was loaded ahead; a load that failed is forgotten: whoever needs it loads it again."""
        for expert, (future, slot) in list(self._ahead.items()):
            if not wait_for_it and not future.done():
                continue
            del self._ahead[expert]
            if future.exception() is None:
                self._insert(expert, slot)
            else:
                self._free.append(slot)

    def layers_report(self, activations: Mapping[int, Mapping[Phase, tuple[int, ...]]]) -> tuple[LayerExperts, ...]:
        """Residency and counts per layer; may be called from another thread than the engine's."""
        resident = set(self._weights.copy())
        return tuple(
            LayerExperts(
                layer=layer,
                num_experts=self.layout.num_experts,
                resident=tuple(e for e in range(self.layout.num_experts) if ExpertId(layer, e) in resident),
                activations=activations.get(layer, {}),
                hits=self._layer_hits[layer],
                misses=self._layer_misses[layer],
            )
            for layer in self.layout.layers
        )

    def close(self) -> None:
        """Stop reading and give the memory back."""
        self._io.shutdown(wait=True)
        self._weights.clear()
        self._reader.close()

    def _use(self, layer: int, experts: Sequence[int]) -> list[tuple[int, ExpertWeights]]:
        group: list[tuple[int, ExpertWeights]] = []
        for expert in experts:
            expert_id = ExpertId(layer, expert)
            self._policy.on_use(expert_id)
            group.append((expert, self._weights[expert_id]))
        return group

    def _start_loads(self, missing: list[ExpertId], loading: dict[Future[None], tuple[ExpertId, int]]) -> None:
        while missing:
            slot = self._take_slot()
            if slot is None:
                return
            expert = missing.pop(0)
            self._pinned.add(expert)
            loading[self._io.submit(self._load, expert, slot)] = (expert, slot)

    def _take_slot(self) -> int | None:
        if self._free:
            return self._free.pop()
        victim = self._policy.choose_victim(self._pinned)
        if victim is None and self._ahead and not self._pinned:
            self.take_in_ahead(wait_for_it=True)  # it has the last slot
            return self._take_slot()
        if victim is None:
            return None
        self._policy.on_evict(victim)
        self._resident[victim.layer][victim.expert] = False
        del self._weights[victim]
        return self._slots.pop(victim)

    def _wait(self, loading: dict[Future[None], tuple[ExpertId, int]]) -> list[ExpertId]:
        began = time.perf_counter()
        done, _ = wait(loading, return_when=FIRST_COMPLETED)
        self.counters.stall_s += time.perf_counter() - began
        ready: list[ExpertId] = []
        failure: BaseException | None = None
        for future in done:
            expert, slot = loading.pop(future)
            failure = failure or future.exception()
            if future.exception() is None:
                self._insert(expert, slot)
                ready.append(expert)
            else:
                self._free.append(slot)
        if failure is not None:
            raise failure
        return sorted(ready)

    def _settle(self, loading: dict[Future[None], tuple[ExpertId, int]]) -> None:
        """Finish loads under way after an early end, so that no thread writes into a slot given away."""
        wait(loading)
        for future, (expert, slot) in loading.items():
            if future.exception() is None:
                self._insert(expert, slot)
            else:
                self._free.append(slot)

    def _insert(self, expert: ExpertId, slot: int) -> None:
        self._slots[expert] = slot
        self._weights[expert] = self._views(expert, slot)
        self._resident[expert.layer][expert.expert] = True
        self._policy.on_insert(expert)

    def _load(self, expert: ExpertId, slot: int) -> None:
        plan = self._plans[expert]
        base = slot * self.slot_bytes
        target = self._view[base : base + self.slot_bytes]
        if not self._converts:
            self._reader.read(plan, target)
            return
        staging = mmap.mmap(-1, plan.slot_bytes)
        self._reader.read(plan, memoryview(staging))
        stored = TORCH_DTYPES[self.layout.stored_dtype]
        parts = self.layout.experts[expert].parts
        for part, offset, at in zip(parts, plan.part_offsets, self._part_offsets(expert), strict=True):
            count = part.num_bytes // stored.itemsize
            source = torch.frombuffer(staging, dtype=stored, count=count, offset=offset)
            torch.frombuffer(target, dtype=self.held_dtype, count=count, offset=at).copy_(source)

    def _views(self, expert: ExpertId, slot: int) -> ExpertWeights:
        base = slot * self.slot_bytes
        views: list[Tensor] = []
        for part, offset in zip(self.layout.experts[expert].parts, self._part_offsets(expert), strict=True):
            dtype = self.held_dtype if self._converts else TORCH_DTYPES[part.dtype]
            count = math.prod(part.shape)
            views.append(torch.frombuffer(self._arena, dtype=dtype, count=count, offset=base + offset).view(part.shape))
        return ExpertWeights.of(self.form, views)

    def _part_offsets(self, expert: ExpertId) -> tuple[int, ...]:
        if not self._converts:
            return self._plans[expert].part_offsets
        sizes = [math.prod(part.shape) * self.held_dtype.itemsize for part in self.layout.experts[expert].parts]
        return tuple(accumulate(sizes[:-1], initial=0))


def held_expert_bytes(layout: ExpertLayout, held_dtype: torch.dtype) -> int:
    """Bytes of all routed experts as held in memory, page alignment included: what 100% means."""
    plans = {expert: plan_read(tensors.parts) for expert, tensors in layout.experts.items()}
    return len(plans) * _slot_size(layout, held_dtype, plans)


def _slot_size(layout: ExpertLayout, held_dtype: torch.dtype, plans: Mapping[ExpertId, ReadPlan]) -> int:
    if layout.form.held_as(held_dtype) == layout.form:
        return max(plan.slot_bytes for plan in plans.values())
    parts = next(iter(layout.experts.values())).parts
    size = sum(math.prod(part.shape) for part in parts) * held_dtype.itemsize
    return -(-size // PAGE_BYTES) * PAGE_BYTES
