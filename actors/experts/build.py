"""Puts the experts of one process together: budget, memory, reader, kernels."""

from __future__ import annotations

from actors.experts.backend import ExpertBackend
from actors.experts.budget import expert_budget
from actors.experts.compute import ExpertCompute
from actors.experts.formats.base import TORCH_DTYPES
from actors.experts.policies.lru import LruPolicy
from actors.experts.reader import ExpertReader
from actors.experts.store import ExpertStore, held_expert_bytes
from actors.kernels.native import NativeKernels
from actors.model.checkpoint import LoadedModel
from cluster.config import AUTO, ExpertsConfig


class BackendBuilder:
    """Makes backends of one model: a process's own, and the small one that stands in for a lost host."""

    def __init__(self, config: ExpertsConfig, loaded: LoadedModel, native: NativeKernels | None) -> None:
        self._config = config
        self._loaded = loaded
        stored = TORCH_DTYPES[loaded.layout.stored_dtype]
        # In float32 stored narrow values are widened in the kernel, which is exact: never hold more bytes than stored.
        self._held = stored if stored.itemsize <= loaded.dtype.itemsize else loaded.dtype
        self.compute = ExpertCompute(native, loaded.layout.form.held_as(self._held), compute_dtype=loaded.dtype)
        self.total_bytes = held_expert_bytes(loaded.layout, self._held)

    def calibrate(self) -> None:
        """Choose kernels for this machine."""
        layout = self._loaded.layout
        self.compute.calibrate(layout.hidden, layout.intermediate)

    def budget(self, setting: str, *, kv_bytes: int, share: float = 1.0) -> int:
        """Bytes that `setting` means. Args: share: part of the model's experts that `auto` need not exceed."""
        if setting == AUTO:
            return expert_budget(AUTO, total_bytes=-int(-self.total_bytes * share // 1), kv_bytes=kv_bytes)
        return expert_budget(setting, total_bytes=self.total_bytes, kv_bytes=kv_bytes)

    def build(self, budget_bytes: int) -> ExpertBackend:
        """A backend with a memory of `budget_bytes`.

        Raises:
            ConfigError: it does not hold one token's experts; names the minimum.
        """
        layout = self._loaded.layout
        reader = ExpertReader(
            {part.file for expert in layout.experts.values() for part in expert.parts},
            direct_io=self._config.direct_io == "auto",
        )
        store = ExpertStore(
            layout,
            reader,
            LruPolicy(),
            budget_bytes=budget_bytes,
            held_dtype=self._held,
            min_experts=self._loaded.top_k,
            io_threads=self._config.io_threads,
        )
        return ExpertBackend(store, self.compute)

    def build_smallest(self) -> ExpertBackend:
        """Room for one token's experts of a layer."""
        per_expert = -(-self.total_bytes // len(self._loaded.layout.experts))
        return self.build(per_expert * self._loaded.top_k)
