"""The expert memory's budget from its setting."""

from __future__ import annotations

from pathlib import Path

import pytest

from actors.experts import budget


def test_sizes_and_percentages_are_taken_as_given() -> None:
    assert budget.expert_budget("25%", total_bytes=1000, kv_bytes=0) == 250
    assert budget.expert_budget("2KiB", total_bytes=1000, kv_bytes=0) == 2048


def test_auto_is_all_experts_when_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory_bytes", lambda: 10_000)

    assert budget.expert_budget("auto", total_bytes=1000, kv_bytes=2000) == 1000


def test_auto_leaves_room_for_the_kv_cache_and_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(budget, "free_memory_bytes", lambda: 10_000)

    assert budget.expert_budget("auto", total_bytes=100_000, kv_bytes=2000) == 5600
    assert budget.expert_budget("auto", total_bytes=100_000, kv_bytes=20_000) == 0


def test_free_memory_is_no_more_than_the_machine_has() -> None:
    total = next(line for line in Path("/proc/meminfo").read_text().splitlines() if line.startswith("MemTotal"))

    assert 0 < budget.free_memory_bytes() <= int(total.split()[1]) * 1024
