"""The expert memory's budget from its setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.experts.budget import expert_budget
from cluster.node_memory.leases import MemoryLease
from cluster.node_memory.limits import free_memory_bytes
from cluster.node_memory.share import MemoryLevel

FIELD = "experts.cache"
GB, MIB = 10**9, 2**20  # this process fills a little while it asks


@pytest.fixture
def lease(tmp_path: Path) -> MemoryLease:
    return MemoryLease("model", directory=tmp_path, levels=lambda: (MemoryLevel("", 10 * GB),))


def test_sizes_and_percentages_are_taken_as_given(lease: MemoryLease) -> None:
    assert expert_budget("25%", total_bytes=1000, lease=lease, field=FIELD) == 250
    assert expert_budget("2KiB", total_bytes=1000, lease=lease, field=FIELD) == 2048


def test_auto_is_all_experts_when_they_fit(lease: MemoryLease) -> None:
    lease.book("attention.kv_cache", 2 * GB)

    assert expert_budget("auto", total_bytes=1000, lease=lease, field=FIELD) == 1000
    assert expert_budget("auto", total_bytes=1000, lease=lease, field=FIELD, most=600) == 600


@pytest.mark.parametrize(("kv_bytes", "budget"), [(2 * GB, 5.6 * GB), (20 * GB, 0)])
def test_auto_leaves_room_for_the_kv_cache_and_others(lease: MemoryLease, kv_bytes: int, budget: float) -> None:
    lease.book("attention.kv_cache", kv_bytes)

    assert expert_budget("auto", total_bytes=100 * GB, lease=lease, field=FIELD) == pytest.approx(budget, abs=MIB)


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))

    assert 0 < free_memory_bytes() <= int(total.split()[1]) * 1024
