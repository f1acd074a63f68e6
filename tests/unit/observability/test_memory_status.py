"""What a process says of its expert memory is what the store counted, in sum and by layer and tier."""

from __future__ import annotations

import time
from collections.abc import Iterator

import pytest
import torch
from expert_builders import ExpertFile, dense_form, open_store, write_experts

from actors.experts.backend import ExpertBackend
from actors.experts.compute import ExpertCompute
from actors.experts.memory.counters import CALIBRATION_BINS, MemoryCounters
from actors.experts.memory.report import layers_report
from actors.experts.memory.store import ExpertStore
from actors.experts.report import calibration, memory_status
from cluster.config.sections import ExpertsConfig
from cluster.status.expert_memory import CalibrationBin
from cluster.types import Tier

NUM_EXPERTS, SLOTS, RAM_SLOTS = 6, 3, 5


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), layers=2, num_experts=NUM_EXPERTS)


@pytest.fixture
def store(experts: ExpertFile) -> Iterator[ExpertStore]:
    probe = open_store(experts, slots=1)
    probe.close()
    opened = open_store(
        experts,
        slots=SLOTS,
        ram_bytes=RAM_SLOTS * probe.slot_bytes,
        ram_gb_per_s=1.0,
    )
    yield opened
    opened.close()


def _acquire(store: ExpertStore, layer: int, *experts: int) -> None:
    for _ in store.acquire(layer, experts):
        pass


def test_tiers_counts_and_layers_agree(store: ExpertStore) -> None:
    backend = ExpertBackend(store, ExpertCompute(None, dense_form(torch.float32), compute_dtype=torch.float32))
    _acquire(store, 0, 0, 1)
    _acquire(store, 1, 2)
    _acquire(store, 0, 0, 1)  # both are there
    _acquire(store, 1, 3, 4)  # so that two leave
    end_s = time.monotonic() + 10
    while store.ram_resident < RAM_SLOTS or not store.wait_idle(10):  # it fills up by itself
        assert time.monotonic() < end_s

    memory = memory_status(backend, ExpertsConfig(eviction="moesaic", prediction="moesaic"))

    assert (memory.eviction, memory.prediction, memory.search_share) == ("lru", "none", 0.0), "it hears no gates"
    assert memory_status(backend, ExpertsConfig(eviction="lfu")).eviction == "lfu"
    assert [tier.tier for tier in memory.tiers] == [Tier.DEVICE, Tier.RAM, Tier.DISK]
    device, host, disk = memory.tiers
    assert device.resident_bytes == SLOTS * store.slot_bytes == device.budget_bytes == memory.resident_bytes
    assert host.budget_bytes == RAM_SLOTS * store.slot_bytes
    assert host.emulated and not disk.emulated
    assert (disk.budget_bytes, disk.bytes_moved) == (None, memory.bytes_read)
    assert (memory.hits, memory.misses) == (2, 5)
    assert sum(memory.misses_by_tier.values()) == 5
    assert memory.num_experts == 2 * NUM_EXPERTS
    assert memory.stall_s > 0

    layers = layers_report(store, {})
    assert [(layer.hits, layer.misses) for layer in layers] == [(2, 2), (0, 3)]
    assert sum(layer.stall_s for layer in layers) == pytest.approx(memory.stall_s)
    assert sum(len(layer.resident) for layer in layers) == memory.num_resident == SLOTS
    assert sum(len(layer.ram_resident) for layer in layers) == host.num_resident == RAM_SLOTS
    for tier, count in memory.misses_by_tier.items():
        assert sum(layer.misses_by_tier[tier] for layer in layers) == count


def test_calibration_has_a_bin_for_every_range_once_there_are_forecasts() -> None:
    counters = MemoryCounters(num_layers=1)
    assert calibration(counters) == ()
    counters.num_forecasts[[0, 9]] = 4, 2
    counters.predicted[[0, 9]] = 0.2, 1.9
    counters.came_true[[0, 9]] = 1, 2

    bins = calibration(counters)

    assert len(bins) == CALIBRATION_BINS
    assert bins[0] == CalibrationBin(predicted=0.05, observed=0.25, count=4)
    assert bins[9] == CalibrationBin(predicted=0.95, observed=1.0, count=2)
    assert set(bins[1:9]) == {CalibrationBin(predicted=0.0, observed=0.0, count=0)}
