"""What hosts say of their memories is in the shared store, now and then, under their own names."""

from __future__ import annotations

from dataclasses import replace

import pytest
from fakes import MEMORY
from scheduler_values import host_report

from cluster.control.host_memories import HostMemories
from cluster.stats.memory_store import MemoryStore
from cluster.status.expert_memory import ExpertMemoryStatus


class _Store(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.num_reports = 0

    def report_owner(self, fingerprint: str, owner: str, status: ExpertMemoryStatus) -> None:
        if self.away:
            raise ConnectionError("no route")
        self.num_reports += 1
        super().report_owner(fingerprint, owner, status)


def test_reports_are_left_every_few_seconds_and_again_after_a_failure() -> None:
    store = _Store()
    memories = HostMemories(store, "f")
    loading, ready = host_report(0), replace(host_report(1), memory=MEMORY)

    for now_s in (0.0, 1.0, 9.0):
        memories.keep([loading, ready], now_s)
    assert store.owners("f") == {ready.host_id: MEMORY}
    assert store.num_reports == 1

    store.away = True
    with pytest.raises(ConnectionError):
        memories.keep([ready], 11.0)
    store.away = False
    memories.keep([ready], 12.0)
    assert store.num_reports == 2
