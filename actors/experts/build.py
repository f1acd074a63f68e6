"""Puts the experts of one process together: budget, memory, reader, kernels."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

from actors.experts.backend import ExpertBackend
from actors.experts.budget import expert_budget
from actors.experts.compute import ExpertCompute
from actors.experts.memory.arena import RamArena
from actors.experts.memory.disk import DiskLink
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore
from actors.experts.memory.views import view_bytes_for
from actors.experts.policy_runner import PolicyRunner
from actors.kernels.native import NativeKernels
from actors.kernels.search import load_search
from actors.model.checkpoint import LoadedModel
from actors.weights.formats.base import TORCH_DTYPES
from actors.weights.reader import ExpertReader
from actors.weights.slots import SlotForm, held_expert_bytes
from cluster.config.sections import ExpertsConfig
from cluster.config.sizes import parse_cache_size
from cluster.node_memory.leases import MemoryLease
from cluster.policies.base import PolicySet, Scorer
from cluster.policies.build import WITHOUT_GATES, PolicyContext, PolicySettings, build_policies
from cluster.policies.eviction.lru import LruScorer
from cluster.policies.eviction.score_snapshot import ScoreSnapshot
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.signals import Grid
from cluster.semantics.request_mix import RequestMix

FormedLink = Callable[[SlotForm, RamArena], MemoryLink]
_FIRST_GUESS_S = 1e-3  # of a load's and a layer's time, until they are measured


class BackendBuilder:
    """Makes backends of one model: a process's own, and the small one that stands in for a lost host."""

    def __init__(
        self, config: ExpertsConfig, loaded: LoadedModel, native: NativeKernels | None, lease: MemoryLease
    ) -> None:
        """Args: lease: of this process, for what its memories will fill."""
        self._config = config
        self._loaded = loaded
        stored = TORCH_DTYPES[loaded.layout.stored_dtype]
        # In float32 stored narrow values are widened in the kernel, which is exact: never hold more bytes than stored.
        self._held = stored if stored.itemsize <= loaded.dtype.itemsize else loaded.dtype
        self.compute = ExpertCompute(native, loaded.layout.form.held_as(self._held), compute_dtype=loaded.dtype)
        self.total_bytes = held_expert_bytes(loaded.layout, self._held)
        self._lease = lease
        expert_budget(config.ram_tier, total_bytes=self.total_bytes, lease=lease, field="experts.ram_tier")

    @property
    def grid(self) -> Grid:
        """The model's experts."""
        return self._form().grid

    def calibrate(self) -> None:
        """Choose kernels for this machine."""
        layout = self._loaded.layout
        self.compute.calibrate(layout.hidden, layout.intermediate)

    def budget(self, field: str, setting: str, *, share: float = 1.0) -> int:
        """Bytes that a setting means. Args: field: its name. share: part of the model's experts that `auto` need not
        exceed."""
        most = -int(-self.total_bytes * share // 1)
        return expert_budget(setting, total_bytes=self.total_bytes, lease=self._lease, field=field, most=most)

    def build(
        self, budget_bytes: int, *, has_ram_tier: bool = True, sources: tuple[FormedLink, ...] = ()
    ) -> ExpertBackend:
        """A backend whose memory hears no gates: where the policy needs them, it evicts what was used longest ago.

        Args: sources: links to prefer to the disk.

        Raises:
            ConfigError: the budget does not hold one token's experts; names the minimum.
        """
        form = self._form()
        name = self._config.eviction if self._config.eviction in WITHOUT_GATES else "lru"
        policies = build_policies(name, self._context(form, budget_bytes, CostMeter(load_s=0, layer_s=0)))
        ram_bytes = self._ram_bytes(form) if has_ram_tier else 0
        store = self._store(form, policies.scorer, budget_bytes=budget_bytes, ram_bytes=ram_bytes, sources=sources)
        return ExpertBackend(store, self.compute)

    def build_for_outlooks(
        self, budget_bytes: int, sources: tuple[FormedLink, ...] = ()
    ) -> tuple[ExpertBackend, ScoreSnapshot | None]:
        """A backend whose memory hears from others what its experts are worth, and where that is told; until then, and
        where the policy needs no gates, it evicts by itself. Args and errors as in `build`."""
        if self._config.eviction in WITHOUT_GATES:
            return self.build(budget_bytes, sources=sources), None
        form = self._form()
        scores = ScoreSnapshot(LruScorer(form.grid.size), form.grid.size)
        store = self._store(form, scores, budget_bytes=budget_bytes, ram_bytes=self._ram_bytes(form), sources=sources)
        return ExpertBackend(store, self.compute), scores

    def build_policies(self, num_slots: int, mix: RequestMix | None) -> tuple[PolicySet, CostMeter]:
        """The configured policies, of a memory of so many slots that is elsewhere. Args: mix: as in PolicyContext."""
        form, meter = self._form(), CostMeter(load_s=_FIRST_GUESS_S, layer_s=_FIRST_GUESS_S)
        context = replace(self._context(form, num_slots * form.slot_bytes, meter), mix=mix)
        return build_policies(f"{self._config.eviction}+{self._config.prediction}", context), meter

    def build_with_policies(
        self, budget_bytes: int, sources: tuple[FormedLink, ...] = (), mix: RequestMix | None = None
    ) -> tuple[ExpertBackend, PolicyRunner | None]:
        """A backend with the configured policies; who runs the model tells the policy runner, if any,
        what its gates say.

        Args: sources: links to prefer to the disk. mix: as in PolicyContext.

        Raises:
            ConfigError: as in `build`.
        """
        form, config = self._form(), self._config
        meter = CostMeter(load_s=_FIRST_GUESS_S, layer_s=_FIRST_GUESS_S)
        context = replace(self._context(form, budget_bytes, meter), mix=mix)
        policies = build_policies(f"{config.eviction}+{config.prediction}", context)
        store = partial(self._store, form, budget_bytes=budget_bytes, ram_bytes=self._ram_bytes(form), sources=sources)
        if not policies.listeners and policies.predictor is None:
            return ExpertBackend(store(policies.scorer), self.compute), None
        snapshot = ScoreSnapshot(policies.scorer, form.grid.size)
        backend = ExpertBackend(store(snapshot), self.compute)
        return backend, PolicyRunner(backend.store, policies, snapshot, meter)

    def build_smallest(self) -> ExpertBackend:
        """Room for one token's experts of a layer."""
        per_expert = -(-self.total_bytes // len(self._loaded.layout.experts))
        return self.build(per_expert * self._loaded.top_k, has_ram_tier=False)

    def _ram_bytes(self, form: SlotForm) -> int:
        return min(parse_cache_size(self._config.ram_tier, total_bytes=self.total_bytes), form.model_bytes)

    def _form(self) -> SlotForm:
        return SlotForm(self._loaded.layout, self._held, top_k=self._loaded.top_k)

    def _context(self, form: SlotForm, budget_bytes: int, meter: CostMeter) -> PolicyContext:
        return PolicyContext(
            grid=form.grid,
            num_slots=min(budget_bytes // form.slot_bytes, form.grid.size),
            embedding_dim=self._loaded.layout.hidden,
            costs=meter.costs,
            settings=PolicySettings(kernels=load_search()),
        )

    def _store(
        self,
        form: SlotForm,
        scorer: Scorer,
        *,
        budget_bytes: int,
        ram_bytes: int,
        sources: tuple[FormedLink, ...] = (),
    ) -> ExpertStore:
        layout, config = self._loaded.layout, self._config
        reader = ExpertReader(
            {part.file for expert in layout.experts.values() for part in expert.parts},
            direct_io=config.direct_io == "auto",
        )
        self._lease.book("views of experts", view_bytes_for(min(budget_bytes // form.slot_bytes, form.grid.size)))
        return ExpertStore(
            form,
            scorer,
            (*(partial(make, form) for make in sources), partial(DiskLink, reader, form)),
            budget_bytes=budget_bytes,
            min_experts=self._loaded.top_k,
            io_threads=config.io_threads,
            ram_bytes=ram_bytes,
            ram_gb_per_s=config.link_gb_per_s,
            load_timeout_s=config.load_timeout_s,
        )
