"""A running worker's expert memory gets another budget, or a reason."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from expert_builders import ExpertFile, open_store, write_experts

from actors.engine.cache_change import change_cache
from cluster.config.load import load_config
from cluster.errors import ConfigError, InvalidRequest, NothingToChange
from cluster.node_memory.leases import MemoryLease
from cluster.node_memory.share import MemoryLevel

SLOTS, SIZE = 4, 12
PLENTY = 10**12


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"), layers=2, num_experts=SIZE // 2)


@pytest.fixture
def make_parts(experts: ExpertFile, tmp_path: Path) -> Iterator[Any]:
    opened: list[Any] = []

    def make(free_bytes: int = PLENTY) -> Any:
        store = open_store(experts, slots=SLOTS, min_experts=2)
        lease = MemoryLease("m", directory=tmp_path, levels=lambda: (MemoryLevel("", free_bytes),))
        lease.book("experts.cache", store.budget_bytes)
        opened.append(store)
        return SimpleNamespace(backend=SimpleNamespace(store=store), lease=lease)

    yield make
    for store in opened:
        store.close()


def test_a_share_of_all_is_taken_and_promised(make_parts: Any) -> None:
    parts = make_parts()
    store = parts.backend.store
    for setting in ("100%", str(store.slot_bytes * 2), "50%"):
        change_cache(parts, setting)

    assert store.num_slots == SIZE // 2
    room = parts.lease.room_for("experts.cache")
    assert room == pytest.approx(PLENTY, abs=2**20), "promised anew, not on top; a process fills a little besides"


@pytest.mark.parametrize("setting", ["200%", "100.1%", "1TiB"])
def test_more_than_all_is_refused_with_the_largest(make_parts: Any, setting: str) -> None:
    parts = make_parts()
    store = parts.backend.store

    with pytest.raises(
        InvalidRequest, match=rf"the largest that fits is {store.model_bytes} bytes \(100.0%"
    ) as refused:
        change_cache(parts, setting)

    assert refused.value.param == "cache"
    assert store.num_slots == SLOTS


def test_more_than_the_node_has_room_for_is_refused_and_less_is_always_taken(make_parts: Any) -> None:
    parts = make_parts(free_bytes=0)
    store = parts.backend.store

    with pytest.raises(InvalidRequest, match=f"the largest that fits is {store.budget_bytes} bytes"):
        change_cache(parts, "100%")
    change_cache(parts, str(store.budget_bytes))
    change_cache(parts, "25%")

    assert store.num_slots == SIZE // 4


@pytest.mark.parametrize("setting", ["1%", "lots", "-5%", "auto"])
def test_what_is_no_budget_is_refused(make_parts: Any, setting: str) -> None:
    with pytest.raises(InvalidRequest):
        change_cache(make_parts(), setting)


def test_workers_whose_hosts_have_the_experts_have_nothing_to_change() -> None:
    with pytest.raises(NothingToChange, match="host_cache"):
        change_cache(SimpleNamespace(backend=None), "50%")  # type: ignore[arg-type]


@pytest.mark.parametrize("field", ["cache", "host_cache", "ram_tier", "remote_tier"])
def test_no_setting_is_more_than_all(field: str) -> None:
    with pytest.raises(ConfigError, match=f"{field}.*100% is the most"):
        load_config(None, {"experts": {field: "200%"}})
