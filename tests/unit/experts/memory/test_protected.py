"""What a memory is to have: fetched while it is absent, evicted last, looked at without harm."""

from __future__ import annotations

import itertools
import threading
import time
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import pytest
from expert_builders import ExpertFile, HeldLink, open_store, write_experts
from live_server import poll

from actors.experts.memory.arena import RamArena
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.peer import PeerLink
from actors.experts.memory.shelves import RemoteReadError
from actors.experts.memory.store import ExpertStore
from actors.weights.slots import SlotForm
from cluster.types import ExpertId, Tier

NEVER = threading.Event()


@pytest.fixture(scope="module")
def experts(tmp_path_factory: pytest.TempPathFactory) -> ExpertFile:
    return write_experts(tmp_path_factory.mktemp("experts"))


class _SlowLink:
    """Takes 10 ms for a chunk."""

    def __init__(self, link: MemoryLink) -> None:
        self._link = link

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        time.sleep(0.01)
        return self._link.copy_chunk(index, chunk, slot)

    def __getattr__(self, name: str) -> object:
        return getattr(self._link, name)


def _mask(store: ExpertStore, indices: Sequence[int], value: float = 1.0) -> np.ndarray:
    mask = np.zeros(store.grid.size, dtype=np.float32)
    mask[list(indices)] = value
    return mask


def _keep(store: ExpertStore, indices: Sequence[int]) -> None:
    store.protected.protect(_mask(store, indices) > 0, _mask(store, indices))


def _resident(store: ExpertStore) -> list[int]:
    return np.flatnonzero(np.concatenate([store.resident(layer) for layer in store.grid.layers])).tolist()


def test_kept_experts_come_and_strays_leave_before_them(experts: ExpertFile) -> None:
    store = open_store(experts, slots=4)
    _keep(store, [1, 2, 7])
    assert store.protected.wait([1, 2, 7], 10, NEVER) == []

    for expert in (0, 3, 4, 5):
        list(store.acquire(0, [expert]))
        assert set(_resident(store)) == {1, 2, 7, expert}

    list(store.acquire(1, [0, 2, 3]))  # more strays than there is room beside the kept: demands go first
    assert store.protected.wait([1, 2, 7], 10, NEVER) == [], "and what they drove out comes back"
    store.close()


def test_more_than_fits_is_kept_as_far_as_it_fits(experts: ExpertFile) -> None:
    store = open_store(experts, slots=3)
    _keep(store, range(6))

    absent = store.protected.wait(range(6), 10, NEVER)

    assert len(absent) == 3
    assert store.protected.is_full
    before, loads = _resident(store), store.bytes_read
    assert store.wait_idle(10)
    assert (_resident(store), store.bytes_read) == (before, loads), "it does not churn"
    store.close()


def test_wait_for_what_has_no_room_ends_while_expected_experts_come_and_go(experts: ExpertFile) -> None:
    """As when an epoch is prepared on a host that is told of new wishes at each layer: its link is never idle."""
    store = open_store(experts, slots=3, wrap=_SlowLink)
    _keep(store, range(6))
    store.protected.wait(range(6), 10, NEVER)
    is_over = threading.Event()

    def expect() -> None:
        for first in itertools.count():
            if is_over.wait(1e-3):
                return
            wishes = _mask(store, range(6))
            wishes[:6] = np.roll(np.arange(1, 7), first)
            store.protected.expect(wishes)

    thread = threading.Thread(target=expect)
    thread.start()
    try:
        poll(lambda: not store.wait_idle(0), deadline_s=10, what="a link that is busy")
        began_s = time.monotonic()
        absent = store.protected.wait(range(6), 20, NEVER)
        assert absent and time.monotonic() - began_s < 10
    finally:
        is_over.set()
        thread.join()
    store.close()


def test_new_experts_take_the_place_of_what_is_not_kept_any_more(experts: ExpertFile) -> None:
    store = open_store(experts, slots=3)
    _keep(store, [0, 1, 2])
    store.protected.wait([0, 1, 2], 10, NEVER)

    _keep(store, [2, 8, 9])

    assert store.protected.wait([2, 8, 9], 10, NEVER) == []
    assert _resident(store) == [2, 8, 9]
    store.close()


def test_expert_that_cannot_be_read_is_named_and_not_tried_for_ever(experts: ExpertFile) -> None:
    made: list[HeldLink] = []

    def held(link: object) -> HeldLink:
        made.append(HeldLink(link))  # type: ignore[arg-type]
        made[-1].broken.add(1)
        return made[-1]

    store = open_store(experts, slots=4, wrap=held)
    _keep(store, [0, 1])

    assert store.protected.wait([0, 1], 10, NEVER) == [1]
    assert "expert 1 is broken" in (store.protected.failure(1) or "")
    assert store.wait_idle(10)
    assert made[0].loads.count(1) == 1
    made[0].broken.clear()
    _keep(store, [0, 1])
    assert store.protected.wait([0, 1], 10, NEVER) == [], "until it is asked for again"
    store.close()


class Peer:
    """Another host with the same experts; `damages` what it sends."""

    def __init__(self, store: ExpertStore) -> None:
        self.store = store
        self.damages = False
        self.asked: list[ExpertId] = []

    def fetch(self, host: int, form: str, expert: ExpertId, timeout_s: float) -> tuple[np.ndarray, int]:
        self.asked.append(expert)
        data = self.store.protected.read(
            self.store.grid.flat(expert), lambda view: np.frombuffer(view, np.uint8).copy()
        )
        if data is None:
            raise RemoteReadError("not there")
        checksum = zlib.crc32(data.data)
        data[0] ^= self.damages
        return data, checksum

    def checksums(self, host: int, form: str, experts: Sequence[ExpertId]) -> Mapping[ExpertId, int]:
        return {}


@pytest.mark.parametrize("fault", ["none", "damage", "gone"])
def test_experts_come_from_a_peer_and_from_disk_where_that_fails(experts: ExpertFile, fault: str) -> None:
    theirs = open_store(experts, slots=4)
    list(theirs.acquire(0, [0, 1]))
    peer = Peer(theirs)
    peer.damages = fault == "damage"
    links: list[PeerLink] = []

    def first(arena: RamArena) -> PeerLink:
        form = SlotForm(experts.layout, theirs.form.held_dtype)
        links.append(PeerLink(peer, form, arena))
        return links[-1]

    ours = open_store(experts, slots=4, first=first)
    wanted = [3, 4] if fault == "gone" else [0, 1]
    links[0].offered = dict.fromkeys(wanted, 7)
    _keep(ours, wanted)

    assert ours.protected.wait(wanted, 10, NEVER) == []
    assert {expert.expert for expert in peer.asked} == set(wanted)
    moved = ours.counters.bytes_moved
    assert (moved[Tier.REMOTE] > 0, moved[Tier.DISK] > 0) == ((True, False) if fault == "none" else (False, True))
    list(theirs.acquire(0, wanted))
    for index in wanted:
        assert ours.protected.read(index, zlib.crc32) == theirs.protected.read(index, zlib.crc32)
    ours.close()
    theirs.close()


def test_bytes_are_read_where_they_lie_and_stay_meanwhile(experts: ExpertFile) -> None:
    store = open_store(experts, slots=1)
    list(store.acquire(0, [2]))

    def replaced(view: memoryview) -> int:
        assert not store.prefetch(ExpertId(0, 3), replaces=lambda _: True), "it may not leave now"
        return len(view)

    assert store.protected.read(2, replaced) == store.slot_bytes
    assert store.protected.read(3, len) is None
    assert store.prefetch(ExpertId(0, 3), replaces=lambda _: True)
    store.close()
