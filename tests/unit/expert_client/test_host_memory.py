"""What a worker says to which host: each expert once, at what loads cost there, within its share of the bytes."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from actors.data_plane.channel import Welcome
from actors.data_plane.frames import CombineFrame
from actors.expert_client.host_memory import HostMemory
from actors.expert_client.routes import Routes
from cluster.execution.host_times import HostTimes
from cluster.policies.base import PolicySet
from cluster.policies.eviction.frequency import StaticScorer
from cluster.policies.outlook import decode_outlook
from cluster.policies.signals import Grid

GRID = Grid(layers=(0, 3), num_experts=4, top_k=1)


class Channel:
    """Remembers what was said."""

    def __init__(self, name: str, owned: dict[int, tuple[int, ...]], num_slots: int) -> None:
        self.welcome = Welcome(host_id=name, epoch=1, num_experts=4, owned=owned, num_slots=num_slots)
        self.said: list[bytes] = []

    def send_outlook(self, data: bytes) -> None:
        self.said.append(data)

    def values(self) -> np.ndarray:
        heard = decode_outlook(self.said[-1], GRID.size)
        assert heard.values is not None
        return heard.values


def _memory(*channels: Channel) -> HostMemory:
    hosts: list[Any] = [(channel, 1, HostTimes(), channel.welcome.owned) for channel in channels]
    links: Any = SimpleNamespace(routes=Routes.of(hosts, GRID.layers, GRID.num_experts))
    memory = HostMemory(GRID, links)
    memory.set_policies(PolicySet(StaticScorer(np.arange(1.0, 9.0).reshape(2, 4)), None, ()))
    return memory


def test_replica_is_spoken_of_to_the_host_that_would_be_chosen_and_to_no_other() -> None:
    one = Channel("one", {0: (0, 1, 2), 3: (0, 1)}, num_slots=2)
    two = Channel("two", {0: (1, 2, 3), 3: (1, 2, 3)}, num_slots=2)
    memory = _memory(one, two)
    memory.note_frame(100_000)

    memory.publish()

    said = np.stack([one.values(), two.values()])
    assert ((said > 0).sum(axis=0) == 1).all(), "every expert is one host's"
    assert np.allclose(said.sum(axis=0), np.arange(1.0, 9.0), atol=0.05)


def test_what_has_no_room_in_its_share_is_not_said_and_wishes_go_before_values() -> None:
    host = Channel("one", dict.fromkeys(GRID.layers, (0, 1, 2, 3)), num_slots=4)
    memory = _memory(host)
    memory.publish()
    assert not host.said and memory.num_left_out == 1, "no frame went yet"

    memory.note_frame(1000)  # room for 30 bytes
    wishes = np.zeros(GRID.size, np.float32)
    wishes[5] = 1.0
    memory.want(wishes)

    heard = decode_outlook(host.said[-1], GRID.size)
    assert heard.values is None
    assert heard.ahead is not None and np.flatnonzero(heard.ahead).tolist() == [5]
    memory.note_frame(100_000)
    memory.want(None)
    heard = decode_outlook(host.said[-1], GRID.size)
    assert heard.ahead is not None and not heard.ahead.any(), "what was wished is taken back"


def test_prices_are_those_of_the_hosts() -> None:
    host = Channel("one", dict.fromkeys(GRID.layers, (0, 1, 2, 3)), num_slots=4)
    memory = _memory(host)
    assert (memory.num_slots, memory.holds_everything, memory.load_s()) == (4, False, 0.0)
    rows = np.zeros((1, 1), np.float32)

    for _ in range(200):
        memory.note_answer("one", CombineFrame(sequence=1, rows=rows, busy_us=9, load_us=2000, load_cpu_us=500))
        memory.note_answer("two", CombineFrame(sequence=1, rows=rows, busy_us=9, load_us=4000, load_cpu_us=500))
    memory.note_stall(0.25)

    assert memory.load_s() == pytest.approx(0.003)
    assert memory.load_cpu_s() == pytest.approx(0.0005, rel=1e-3)
    assert memory.demand_s() == 0.25
