"""The expert memory of one process: asked for experts, it has them in the DEVICE arena, within a budget in bytes.

One thread (whoever computes) acquires; the threads of the transfer queues fill slots; a forecast may come from a third.
What is in use is never evicted, a demand always finds a slot, and a forecast is only ever a wish. With a RAM arena
below it experts come in two stages that run by themselves: from REMOTE or DISK into RAM, from RAM into DEVICE. An
expert in DEVICE keeps its place in RAM as long as that is worth it: weights never change, so nothing is written back.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import numpy as np

from actors.experts.memory.arena import RamArena
from actors.experts.memory.backoff import ReadBackoff
from actors.experts.memory.counters import MemoryCounters
from actors.experts.memory.demands import Demands
from actors.experts.memory.disk import DiskLink
from actors.experts.memory.emulated import RamLink
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.protected import ProtectedExperts
from actors.experts.memory.shelves import ShelfLink
from actors.experts.memory.stage import MemoryStage
from actors.experts.memory.transfers import ExpertTransfer
from actors.experts.memory.views import ExpertViews
from actors.weights.formats.expert import ExpertWeights
from actors.weights.slots import SlotForm
from cluster.policies.base import Scorer
from cluster.policies.residency import Residency
from cluster.types import ExpertId, Tier

LinkFactory = Callable[[RamArena], MemoryLink]
RamLinkFactory = Callable[[RamArena, RamArena, Callable[[int], int | None]], MemoryLink]
_CLOSE_TIMEOUT_S = 10.0


class ExpertStore:
    """Experts by id, least valuable evicted first."""

    def __init__(
        self,
        form: SlotForm,
        scorer: Scorer,
        sources: Sequence[LinkFactory],
        *,
        budget_bytes: int,
        min_experts: int = 1,
        io_threads: int = 3,
        ram_bytes: int = 0,
        ram_link: RamLinkFactory = RamLink,
        ram_gb_per_s: float = 0.0,
        load_timeout_s: float = 30.0,
    ) -> None:
        """Args: sources: links into the lowest arena, best first; the last one has every expert. ram_bytes: budget of
        RAM; 0: there is none. ram_gb_per_s: declared rate of the link from RAM; 0: what it is.

        Raises:
            ConfigError: a budget does not hold `min_experts`; says the minimum.
        """
        self.form, self.grid, self.layout = form, form.grid, form.layout
        self.budget_bytes, self.ram_budget_bytes = budget_bytes, ram_bytes
        self.counters = MemoryCounters(self.grid.num_layers)
        self._min_experts = min_experts
        self._rows = {layer: row for row, layer in enumerate(self.grid.layers)}
        self._lock = threading.Lock()
        self._scorer = scorer
        arena = RamArena(self.grid.size, form.slot_bytes)
        self._views = ExpertViews(form, arena)
        num_slots = self.form.num_slots(budget_bytes, self._min_experts, "experts.cache")
        self._residents = Residency(self.grid, scorer, num_slots, on_retire=arena.release)
        self._backoff = ReadBackoff([form.files(index)[0] for index in range(self.grid.size)])
        stage = partial(MemoryStage, lock=self._lock, counters=self.counters, done=self._on_end, backoff=self._backoff)
        if ram_bytes:
            ram_slots = self.form.num_slots(ram_bytes, self._min_experts, "experts.ram_tier")
            below = RamArena(self.grid.size, form.slot_bytes)
            ram = Residency(self.grid, scorer, ram_slots, on_retire=below.release)
            links = [make(below) for make in sources]
            self._ram: MemoryStage | None = stage("ram", below, ram, links, num_threads=io_threads, fills_up=True)
            link = ram_link(below, arena, ram.slot_of)  # one chunk after the other: one thread
            rate = ram_gb_per_s * 1e9
            self._device = stage(
                "device", arena, self._residents, [link], num_threads=1, below=self._ram, bytes_per_s=rate
            )
        else:
            self._ram = None
            self._device = stage(
                "device", arena, self._residents, [make(arena) for make in sources], num_threads=io_threads
            )
        self.counters.prefetch_used = self._residents.num_used  # the very arrays
        self.counters.prefetch_wasted = self._residents.num_wasted
        self.counters.prefetch_dropped = self._device.num_dropped
        self.protected = ProtectedExperts(form, self._stages, self._lock)
        self._demands = Demands(form, self._stages, self._lock, timeout_s=load_timeout_s)
        for each in self._stages:
            each.queue.start()

    @property
    def slot_bytes(self) -> int:
        """Bytes one expert takes."""
        return self.form.slot_bytes

    @property
    def model_bytes(self) -> int:
        """Bytes of all experts as held."""
        return self.form.model_bytes

    @property
    def num_slots(self) -> int:
        """Experts that DEVICE has room for."""
        return self._residents.num_slots

    @property
    def view_bytes(self) -> int:
        """What it takes to find experts in their slots: beside the budget, which is for their weights."""
        return self._views.num_bytes

    @property
    def num_resident(self) -> int:
        """Experts in DEVICE."""
        return self._residents.num_resident

    @property
    def holds_everything(self) -> bool:
        """Whether every expert of the model is in DEVICE."""
        return self.num_slots == self._residents.num_resident == self.grid.size

    def acquire(self, layer: int, experts: Sequence[int]) -> Iterator[list[tuple[int, ExpertWeights]]]:
        """Yield the wanted experts in groups as they become ready: residents, then those in flight, then the rest.

        A group stays until the next one is asked for. With fewer slots than experts wanted, the rest is loaded as
        earlier groups are done.

        Raises:
            ExpertReadError: a load failed or took too long; nothing stays in use.
        """
        row, residents, demands, counters = self._rows[layer], self._residents, self._demands, self.counters
        first = row * self.grid.num_experts
        indices = [first + expert for expert in experts]
        here: list[int] = []
        try:
            with self._lock:
                here = residents.claim(indices)
                if here:
                    self._scorer.on_use(here)
                    counters.hits[row] += len(here)
                if len(here) < len(indices):
                    self._ask(row, [index for index in indices if residents.slot_of(index) is None])
            if here:
                yield self._views.group(first, here, residents.slots)
            while demands.waited_for:
                with self._lock:
                    residents.release(here)
                    here = []
                    began_s = time.perf_counter()
                    here = demands.wait_for_some()
                    stall_s = time.perf_counter() - began_s
                    counters.stall_s[row] += stall_s
                    counters.total_stall_s += stall_s
                    residents.touch(here)
                    self._scorer.on_use(here)
                yield self._views.group(first, here, residents.slots)
        finally:
            with self._lock:
                residents.release(here)
                if demands.waited_for:
                    demands.forget()

    def want(self, priority: np.ndarray | None, below: np.ndarray | None = None) -> None:
        """Replace what is to be fetched ahead.

        Args: priority: [N] float32, larger first, 0 and below is not fetched. below: for RAM, if not the same.
        """
        with self._lock:
            freed = self._device.want(priority, keeps_begun=False)
            if self._ram is not None:  # while it has free slots it takes whatever comes
                below = priority if below is None else below
                freed |= self._ram.want(below, keeps_begun=self._ram.residents.num_free > 0)
            if freed:
                self._demands.advance()

    def rank(self, indices: Sequence[int]) -> None:
        """Take residents for used in this order: by recency alone the first would leave first."""
        with self._lock:
            for stage in self._stages:
                stage.residents.order.touch(indices)

    def prefetch(self, expert: ExpertId, *, replaces: Callable[[ExpertId], bool]) -> bool:
        """Begin to bring one expert that nobody waits for a stage higher, one at a time; False if there is no room.

        It comes from where it is now: into RAM first, where there is one, and into DEVICE when it is asked for again.
        Args: replaces: whether the expert is worth more than this one, which would be evicted.
        """
        index = self._index(expert)
        with self._lock:
            if self._residents.slot_of(index) is not None:
                return False
            stage = next((stage for stage in self._stages if stage.source(index) is not None), None)
            if stage is None or stage.queue.transfers:
                return False
            residents = stage.residents
            if not residents.num_free:
                victim = residents.next_victim()
                if victim is None or not replaces(self.form.expert(victim)):
                    return False
            return stage.prefetch(index)

    def resident(self, layer: int) -> np.ndarray:
        """[E] bool: which experts of a layer are in DEVICE now."""
        return self._residents.resident_in(self._rows[layer])

    def in_ram(self, layer: int) -> np.ndarray:
        """[E] bool: which experts of a layer are in RAM now."""
        if self._ram is None:
            return np.zeros(self.grid.num_experts, dtype=np.bool_)
        return self._ram.residents.resident_in(self._rows[layer])

    def set_budget(self, budget_bytes: int) -> None:
        """Change DEVICE's budget while serving; what is more than fits is evicted, what is in use as soon as it may.

        Raises:
            ConfigError: it does not hold one token's experts; says the minimum.
        """
        num_slots = self.form.num_slots(budget_bytes, self._min_experts, "experts.cache")
        with self._lock:
            self.budget_bytes = budget_bytes
            self._residents.resize(num_slots)
            self._views.keep_at_most(num_slots)

    @property
    def bytes_read(self) -> int:
        """From disk since start."""
        return self.counters.bytes_moved[Tier.DISK]

    @property
    def read_mode(self) -> str:
        """How the disk is read."""
        links = (self._ram or self._device).links
        return next((link.mode for link in links if isinstance(link, DiskLink)), "")

    @property
    def problems(self) -> tuple[str, ...]:
        """Why tiers hold less than they should, in words."""
        links = (self._ram or self._device).links
        remote = tuple(problem for link in links if isinstance(link, ShelfLink) for problem in link.problems)
        with self._lock:
            reading = self._backoff.problem()
        return remote if reading is None else (*remote, reading)

    @property
    def source_tiers(self) -> tuple[Tier, ...]:
        """Where experts come from that are in no arena."""
        return tuple(link.tier for link in (self._ram or self._device).links)

    @property
    def link_is_emulated(self) -> bool:
        """Whether the way from RAM only pretends to its rate."""
        return self._device.queue.bytes_per_s > 0

    @property
    def ram_resident(self) -> int:
        """Experts in RAM."""
        return 0 if self._ram is None else self._ram.residents.num_resident

    def load_s(self) -> float:
        """Average time one expert takes into DEVICE, once it is begun and alone."""
        queue = self._device.queue
        return queue.expert_s / queue.num_threads

    def load_s_from(self, tier: Tier) -> float:
        """Average time one expert takes from a tier into DEVICE, once begun and alone; 0: none came from there."""
        if self._ram is None or tier is Tier.RAM:
            return self._device.queue.expert_s_from.get(tier, 0.0) / self._device.queue.num_threads
        below_s = self._ram.queue.expert_s_from.get(tier, 0.0) / self._ram.queue.num_threads
        return below_s and below_s + self.load_s()

    @property
    def loads_give_way(self) -> bool:
        """Whether a prefetch into DEVICE can let a demand go first: not if all its chunks are moved at once."""
        device = self._device
        return device.queue.num_threads < device.links[-1].num_chunks(0)  # the last link has every expert

    def miss_s(self) -> dict[Tier, float]:
        """`load_s_from` of the tiers that something came from."""
        costs = {tier: self.load_s_from(tier) for tier in (Tier.RAM, Tier.REMOTE, Tier.DISK)}
        return {tier: cost_s for tier, cost_s in costs.items() if cost_s > 0}

    def load_cpu_s(self) -> float:
        """Average processor time that takes of this process."""
        return self._device.queue.expert_cpu_s

    def load_late_s(self) -> float:
        """How late chunks of prefetches began, on average, on the emulated way into DEVICE: its thread had to wake."""
        return self._device.queue.late_s

    def demand_s(self) -> float:
        """Seconds since start in which demands had the way into DEVICE."""
        return self._device.queue.demand_s / self._device.queue.num_threads

    def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is under way and nothing is left to fetch ahead; False if that took longer."""
        end_s = time.monotonic() + timeout_s
        while True:
            with self._lock:
                if all(stage.queue.is_idle for stage in self._stages):
                    return True
            if time.monotonic() > end_s:
                return False
            time.sleep(1e-3)

    def close(self) -> None:
        """Stop loading and give the memory back."""
        for stage in self._stages:
            stage.queue.close(_CLOSE_TIMEOUT_S)
        for stage in self._stages:
            with self._lock:
                stage.residents.resize(0)
            for link in stage.links:
                link.close()

    def _ask(self, row: int, missing: Sequence[int]) -> None:
        """Begin to load what a layer waits for. Args: missing: in the order in which it was asked for."""
        sources, num_late = self._demands.ask(missing)
        self.counters.late[row] += num_late
        for tier, count in sources.items():
            self.counters.misses[tier][row] += count

    def _on_end(self, stage: MemoryStage, transfer: ExpertTransfer) -> None:
        """A transfer has ended; under the lock, on its thread."""
        if stage is not self._device:
            self._device.queue.wake()
        self._demands.on_end(transfer)

    @property
    def _stages(self) -> tuple[MemoryStage, ...]:
        return (self._device,) if self._ram is None else (self._device, self._ram)

    def _index(self, expert: ExpertId) -> int:
        return self._rows[expert.layer] * self.grid.num_experts + expert.expert
