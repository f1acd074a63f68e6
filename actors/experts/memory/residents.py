"""Who is where in one arena: slots, residency, who may not leave, and how many slots there are now.

Knows indices and slots; knows no bytes' meaning and no threads: the store's lock guards it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from actors.experts.memory.arena import RamArena
from cluster.policies.base import Scorer
from cluster.policies.eviction.eviction_order import EvictionOrder

_ABSENT = -1


class Residents:
    """The experts of one arena.

    resident, loading: [N] bool, live views. held: [N] int32, how many need an expert to stay.
    """

    def __init__(
        self, arena: RamArena, scorer: Scorer, size: int, num_slots: int, on_evict: Callable[[int], None]
    ) -> None:
        """Args: size: N, experts of the grid. on_evict: told of every expert that leaves."""
        self.arena = arena
        self.num_slots = 0
        self.is_resident = bytearray(size)  # a plain byte is read three times faster than an array's element
        self.resident = np.frombuffer(self.is_resident, dtype=np.bool_)
        self.loading = np.zeros(size, dtype=np.bool_)
        self.held = np.zeros(size, dtype=np.int32)
        self.order = EvictionOrder(scorer, size)
        self._on_evict = on_evict
        self._slots = [_ABSENT] * size
        self._free: list[int] = []
        self._retired = list(range(arena.max_slots - 1, -1, -1))
        self._num_surplus = 0
        self.resize(num_slots)

    @property
    def num_free(self) -> int:
        """Slots that hold nothing."""
        return len(self._free)

    def slot_of(self, index: int) -> int | None:
        """Where an expert is; None unless it is complete."""
        slot = self._slots[index]
        return None if slot == _ABSENT else slot

    def hold(self, indices: Iterable[int]) -> None:
        """These stay until released."""
        for index in indices:
            self.held[index] += 1

    def release(self, indices: Iterable[int]) -> None:
        """One need less for each of these."""
        for index in indices:
            self.held[index] -= 1
        if self._num_surplus:
            self._retire()

    def take_free(self) -> int | None:
        """A slot that holds nothing."""
        return self._free.pop() if self._free else None

    def take(self, kept: np.ndarray | None = None) -> int | None:
        """A slot: a free one, else that of the least valuable expert that may leave. Args: kept: [N] bool, who stays
        besides those that are held."""
        if self._free:
            return self._free.pop()
        is_held = self.held > 0
        victim = self.order.victim(is_held if kept is None else is_held | kept)
        if victim is None:
            return None
        self._evict(victim)
        return self._free.pop() if self._free else None

    def give_back(self, slot: int) -> None:
        """A slot whose expert did not come."""
        if self._num_surplus:
            self._num_surplus -= 1
            self._put_away(slot)
        else:
            self._free.append(slot)

    def insert(self, index: int, slot: int) -> None:
        """An expert is complete."""
        self._slots[index] = slot
        self.is_resident[index] = 1
        self.order.on_insert(index)
        if self._num_surplus:
            self._retire()

    def resize(self, num_slots: int) -> None:
        """Have so many slots from now on; what is in use or on its way gives its slot back as soon as it can."""
        num_slots = min(num_slots, self.arena.max_slots)
        growth = num_slots - self.num_slots
        self.num_slots = num_slots
        reprieved = min(max(growth, 0), self._num_surplus)
        self._num_surplus += max(-growth, 0) - reprieved
        for _ in range(growth - reprieved):
            self._free.append(self._retired.pop())
        self._retire()

    def _retire(self) -> None:
        while self._num_surplus:
            slot = self.take()
            if slot is None:
                return
            self._num_surplus -= 1
            self._put_away(slot)

    def _put_away(self, slot: int) -> None:
        self.arena.release(slot)
        self._retired.append(slot)

    def _evict(self, index: int) -> None:
        assert self._slots[index] != _ABSENT, "only who is here can leave: a slot that is none would be given out"
        self._free.append(self._slots[index])
        self._slots[index] = _ABSENT
        self.is_resident[index] = 0
        self.order.on_evict(index)
        self._on_evict(index)
