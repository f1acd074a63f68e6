"""The expert memory under threads that do not wait for each other: any program of asks, wishes, budgets and failures.

What must hold: an expert in use keeps its bytes, a slot has one writer, the budget is never exceeded, and every demand
ends, right or with the error of the disk that failed it.
"""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass, field

import hypothesis.strategies as st
import numpy as np
import pytest
import torch
from expert_builders import ExpertFile, open_store, write_experts
from hypothesis import HealthCheck, given, settings

from actors.experts.memory.arena import RamArena
from actors.experts.memory.disk import DiskLink
from actors.experts.memory.emulated import RamLink
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.store import ExpertStore
from actors.weights.reader import ExpertReader
from actors.weights.slots import SlotForm
from cluster.errors import ExpertReadError
from cluster.policies.residency import LOADING
from cluster.types import ExpertId, Tier

LAYERS, EXPERTS = 3, 6
NUM = LAYERS * EXPERTS
_DEADLINE_S = 20.0


@dataclass
class Chaos:
    """What all links of one example share: a source of trouble, and who writes where.

    fails: share of the chunks that fail. failed: experts that the disk has failed. wrong: what must not have happened.
    """

    seed: int
    fails: float
    failed: set[int] = field(default_factory=set)
    wrong: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.lock = threading.Lock()
        self.random = random.Random(self.seed)

    def draw(self) -> float:
        with self.lock:
            return self.random.random()


class ChaoticLink:
    """Another link's chunks, late and sometimes not; a REMOTE one also loses and finds experts as it likes."""

    def __init__(self, link: MemoryLink, chaos: Chaos, tier: Tier) -> None:
        self.tier = tier
        self._link, self._chaos = link, chaos
        self._writers: dict[int, list[int]] = {}

    def has(self, index: int) -> bool:
        return self._link.has(index) and (self.tier is not Tier.REMOTE or self._chaos.draw() < 0.5)

    def num_chunks(self, index: int) -> int:
        return self._link.num_chunks(index)

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        with self._chaos.lock:
            writers = self._writers.setdefault(slot, [])
            writers.append(index)
            if set(writers) != {index}:
                self._chaos.wrong.append(f"slot {slot} is written for experts {writers} at once")
        try:
            time.sleep(self._chaos.draw() * 5e-4)
            if self.tier is not Tier.RAM and self._chaos.draw() < self._chaos.fails:
                if self.tier is Tier.DISK:
                    self._chaos.failed.add(index)
                raise ExpertReadError(f"{self.tier} failed for expert {index}")
            return self._link.copy_chunk(index, chunk, slot)
        finally:
            with self._chaos.lock:
                writers.remove(index)

    def close(self) -> None:
        self._link.close()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("stress") / "m", layers=LAYERS, num_experts=EXPERTS)


def _open(file: ExpertFile, chaos: Chaos, slots: int, ram_slots: int) -> ExpertStore:
    """REMOTE before DISK, into RAM if it has slots, all of them chaotic."""
    form = SlotForm(file.layout, torch.float32)

    def remote(arena: RamArena) -> MemoryLink:
        return ChaoticLink(DiskLink(ExpertReader([file.file]), form, arena), chaos, Tier.REMOTE)

    def ram_link(source: RamArena, target: RamArena, slot_of: Callable[[int], int | None]) -> MemoryLink:
        return ChaoticLink(RamLink(source, target, slot_of), chaos, Tier.RAM)

    return open_store(
        file,
        slots=slots,
        io_threads=3,
        first=remote,
        wrap=lambda link: ChaoticLink(link, chaos, Tier.DISK),
        ram_bytes=ram_slots * form.slot_bytes,
        ram_link=ram_link,
        load_timeout_s=_DEADLINE_S,
    )


class Forecaster(threading.Thread):
    """Wishes for other experts all the time, and for nothing, and changes the budget, beside who computes.

    problem: what one of its calls raised.
    """

    def __init__(self, store: ExpertStore, chaos: Chaos, budgets: list[int]) -> None:
        super().__init__(name="forecaster", daemon=True)
        self._store, self._chaos, self._budgets = store, chaos, budgets
        self._ended = threading.Event()
        self.problem: Exception | None = None

    def run(self) -> None:
        try:
            self._forecast()
        except Exception as error:  # noqa: BLE001 - shown by the test
            self.problem = error

    def _forecast(self) -> None:
        while not self._ended.wait(self._chaos.draw() * 1e-3):
            rows = [np.array([self._chaos.draw() - 0.6 for _ in range(NUM)], dtype=np.float32) for _ in range(2)]
            self._store.want(rows[0] if self._chaos.draw() < 0.9 else None, rows[1])
            if self._chaos.draw() < 0.5:  # as a worker beside hosts does
                expert = ExpertId(int(self._chaos.draw() * LAYERS), int(self._chaos.draw() * EXPERTS))
                self._store.prefetch(expert, replaces=lambda _: self._chaos.draw() < 0.5)
            if self._chaos.draw() < 0.2:
                slots = self._budgets[int(self._chaos.draw() * len(self._budgets))]
                self._store.set_budget(slots * self._store.slot_bytes)

    def end(self) -> None:
        self._ended.set()
        self.join(10)
        assert not self.is_alive()
        assert self.problem is None, repr(self.problem)


def _use(store: ExpertStore, file: ExpertFile, layer: int, experts: list[int], chaos: Chaos, stop_after: int) -> None:
    """Compute with every group, slowly; `stop_after` groups the caller loses interest."""
    seen: list[int] = []
    failed: ExpertReadError | None = None
    groups = store.acquire(layer, experts)
    try:
        for number, group in enumerate(groups):
            for moment in ("begin", "end"):
                for expert, weights in group:
                    truth = file.experts[ExpertId(layer, expert)].weights()
                    if not torch.equal(weights.down.data, truth.down.data):
                        chaos.wrong.append(f"expert {expert} of layer {layer} is another at the {moment} of its use")
                time.sleep(chaos.draw() * 3e-4)
            seen += [expert for expert, _ in group]
            if number == stop_after:
                return
    except ExpertReadError as error:
        failed = error
    finally:
        groups.close()
    if failed is None:
        assert sorted(seen) == sorted(experts), "every demand ends"
    else:
        assert any(layer * EXPERTS + expert in chaos.failed for expert in experts), f"nothing failed, but: {failed}"


def _assert_within_budget(store: ExpertStore) -> None:
    """By looking into the arenas: every slot that takes memory counts."""
    for stage in store._stages:
        arena = stage.arena
        assert sum(any(arena.view(slot)) for slot in range(arena.max_slots)) <= stage.residents.num_slots


def _assert_no_slot_is_lost(store: ExpertStore) -> None:
    """Nothing is under way: every slot is free or has an expert."""
    for stage in store._stages:
        residents = stage.residents
        assert residents.num_free + residents.resident.sum() == residents.num_slots
        assert not (residents.state == LOADING).any() and not residents.holds.any()


PROGRAMS = st.lists(
    st.tuples(
        st.integers(0, LAYERS - 1),
        st.lists(st.integers(0, EXPERTS - 1), unique=True, min_size=1),
        st.sampled_from([0, 99, 99, 99]),
    ),
    min_size=5,
    max_size=15,
)


@given(
    program=PROGRAMS,
    slots=st.integers(1, 8),
    ram_slots=st.sampled_from([0, 1, 5, NUM]),
    fails=st.sampled_from([0.0, 0.05]),
    budgets=st.one_of(st.just([]), st.lists(st.integers(1, 8), min_size=1, max_size=4)),
    seed=st.integers(0, 2**16),
)
@settings(max_examples=8, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_any_program_beside_any_forecasts_budgets_and_failures(
    experts: ExpertFile,
    program: list[tuple[int, list[int], int]],
    slots: int,
    ram_slots: int,
    fails: float,
    budgets: list[int],
    seed: int,
) -> None:
    chaos = Chaos(seed, fails)
    store = _open(experts, chaos, slots, ram_slots)
    forecaster = Forecaster(store, chaos, budgets or [slots])
    forecaster.start()
    try:
        for layer, wanted, stop_after in program:
            _use(store, experts, layer, wanted, chaos, stop_after)
        forecaster.end()
        store.want(None)
        assert store.wait_idle(_DEADLINE_S)

        assert chaos.wrong == []
        _assert_within_budget(store)
        _assert_no_slot_is_lost(store)
        chaos.fails = 0.0
        for layer in range(LAYERS):  # no slot was lost on the way
            _use(store, experts, layer, list(range(EXPERTS)), chaos, 99)
        assert store.num_resident == min(store.num_slots, NUM)
        assert chaos.wrong == []
    finally:
        forecaster.end()
        store.close()
