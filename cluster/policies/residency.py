"""Who is where in one expert memory: one state machine per expert. Pure; the live memory and the replay share it.

    ABSENT -- prepare --> LOADING -- complete --> PREFETCHED -- touch --> RESIDENT
    LOADING -- complete --> RESIDENT (somebody waited for it)    LOADING -- abandon --> ABSENT
    PREFETCHED or RESIDENT -- evict --> ABSENT

In vLLM's words (kv_offload) a look-up is a MISS of what is ABSENT, a HIT_PENDING of what is LOADING, else a HIT.
Experts are flat indices of a grid. Whoever owns a memory guards it by one lock and moves the bytes.

Shapes: L MoE layers, E experts of a layer, N = L * E.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import NamedTuple

import numpy as np

from cluster.policies.base import Scorer
from cluster.policies.eviction.eviction_order import EvictionOrder
from cluster.policies.signals import Grid

ABSENT, LOADING, PREFETCHED, RESIDENT = range(4)
NO_SLOT = -1


class Lookup(NamedTuple):
    """Places in what was looked up: of what is complete, of what is on its way, and of the rest; each in its order."""

    hits: list[int]
    pending: list[int]
    missing: list[int]

    @property
    def demand_order(self) -> list[int]:
        """What is waited for: what is on its way goes first, it is there the soonest."""
        return self.pending + self.missing


class Residency:
    """The experts of one memory, and its slots.

    The arrays are C-contiguous and written in place: their addresses hold for life, so that compiled code and a table
    of addresses may read them. Read them under the owner's lock; or without it: `epoch`, then `slot`, then `epoch`
    again, which was odd and is the same.

    state: [L, E] uint8, one of the four above. slot: [L, E] int32, from LOADING on one that no other expert has, else
    -1. holds: [L, E] int32, how many need an expert to stay. epoch: [L, E] uint32, one more whenever an expert becomes
    complete or leaves: odd while its slot may be read. num_used, num_wasted: [L] int64, PREFETCHED experts that were
    touched, and evicted, since start. num_slots: that there are to be; num_resident: complete experts; num_awaited:
    held ones that are not complete, so that somebody waits for them. order: who leaves first.

    >>> from cluster.policies.eviction.lru import LruScorer
    >>> memory = Residency(Grid(layers=(0,), num_experts=3, top_k=1), LruScorer(3), num_slots=1)
    >>> memory.prepare(2), memory.lookup([2]).pending
    (True, [0])
    >>> memory.complete(2, prefetched=True)
    >>> memory.claim([2]), memory.num_used.tolist()
    ([2], [1])
    >>> memory.prepare(0)  # the only slot is that of an expert in use
    False
    >>> memory.release([2])
    >>> memory.prepare(0), memory.state.tolist(), memory.slot.tolist()
    (True, [[1, 0, 0]], [[0, -1, -1]])
    """

    def __init__(
        self,
        grid: Grid,
        scorer: Scorer,
        num_slots: int,
        *,
        max_slots: int | None = None,
        on_retire: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Args: max_slots: that `resize` may ask for; None: one for each expert. on_retire: told of every slot that
        there is to be no longer; it holds nothing."""
        shape = grid.num_layers, grid.num_experts
        self.max_slots = grid.size if max_slots is None else max_slots
        self.state = np.zeros(shape, dtype=np.uint8)
        self.slot = np.full(shape, NO_SLOT, dtype=np.int32)
        self.holds = np.zeros(shape, dtype=np.int32)
        self.epoch = np.zeros(shape, dtype=np.uint32)
        self.num_used = np.zeros(grid.num_layers, dtype=np.int64)
        self.num_wasted = np.zeros(grid.num_layers, dtype=np.int64)
        self.order = EvictionOrder(scorer, grid.size)
        self.num_slots = self.num_resident = self.num_awaited = 0
        self._num_experts = grid.num_experts
        self._on_retire = on_retire
        # The same memory: an element of a memoryview is read three times as fast as one of an array.
        self.states, self.slots, self._holds, self._epochs = (
            values.reshape(-1).data for values in (self.state, self.slot, self.holds, self.epoch)
        )
        self._free: list[int] = []
        self._retired = list(range(self.max_slots - 1, -1, -1))
        self._num_surplus = 0
        self.resize(num_slots)

    @property
    def num_free(self) -> int:
        """Slots that no expert has."""
        return len(self._free)

    @property
    def resident(self) -> np.ndarray:
        """[N] bool: which experts are complete now."""
        return self.state.reshape(-1) >= PREFETCHED

    @property
    def absent(self) -> np.ndarray:
        """[N] bool: which experts are neither complete nor on their way now."""
        return self.state.reshape(-1) == ABSENT

    def resident_in(self, row: int) -> np.ndarray:
        """[E] bool: which experts of a layer are complete now. Args: row: of the grid."""
        return self.state[row] >= PREFETCHED

    def slot_of(self, index: int) -> int | None:
        """Where an expert is; None unless it is complete."""
        return self.slots[index] if self.states[index] >= PREFETCHED else None

    def lookup(self, indices: Sequence[int], *below: Residency) -> Lookup:
        """Which of these are complete, and which are on their way. Args: below: memories that they come through."""
        found = Lookup([], [], [])
        states, (hits, pending, missing) = self.states, found
        for place, index in enumerate(indices):
            state = states[index]
            if state >= PREFETCHED:
                hits.append(place)
            elif state == LOADING or any(memory.states[index] == LOADING for memory in below):
                pending.append(place)
            else:
                missing.append(place)
        return found

    def claim(self, indices: Sequence[int]) -> list[int]:
        """Of experts of one layer, those that are complete: they are held and touched. The rest is unchanged."""
        states, holds, hits = self.states, self._holds, list[int]()
        num_used = 0
        for index in indices:
            state = states[index]
            if state >= PREFETCHED:
                hits.append(index)
                holds[index] += 1
                if state == PREFETCHED:
                    states[index] = RESIDENT
                    num_used += 1
        if hits:
            if num_used:
                self.num_used[hits[0] // self._num_experts] += num_used
            self.order.touch(hits)
        return hits

    def touch(self, indices: Sequence[int]) -> None:
        """Complete experts are used, in this order. Their holds are unchanged."""
        for index in indices:
            if self.states[index] == PREFETCHED:
                self.states[index] = RESIDENT
                self.num_used[index // self._num_experts] += 1
        self.order.touch(indices)

    def hold(self, indices: Iterable[int]) -> None:
        """These stay until released; if they are not complete, from when they are."""
        for index in indices:
            if not self._holds[index] and self.states[index] < PREFETCHED:
                self.num_awaited += 1
            self._holds[index] += 1

    def release(self, indices: Iterable[int]) -> None:
        """One need less for each of these."""
        holds, states = self._holds, self.states
        for index in indices:
            holds[index] -= 1
            if not holds[index] and states[index] < PREFETCHED:
                self.num_awaited -= 1
        if self._num_surplus:
            self._retire()

    def prepare(self, index: int, kept: np.ndarray | None = None) -> bool:
        """Give an absent expert a slot: a free one, else that of the least valuable expert that may leave.

        Returns False and changes nothing where there is neither.
        Args: kept: [N] bool, who stays besides those that are held.
        """
        assert self.states[index] == ABSENT, "an expert has one slot"
        if not self._free and not self._evict_one(kept):
            return False
        self.slots[index] = self._free.pop()
        self.states[index] = LOADING
        return True

    def next_victim(self, kept: np.ndarray | None = None) -> int | None:
        """Who would leave now for another; None: nobody may. Args: kept: as in `prepare`."""
        return self.order.victim(self._held() if kept is None else self._held() | kept)

    def make_room(self, num_slots: int) -> int:
        """Evict until so many slots are free, as far as may be; how many of them there are."""
        missing = num_slots - len(self._free)
        if missing > 0:
            for victim in self.order.victims(missing, self._held()):
                self._evict(victim)
        return min(num_slots, len(self._free))

    def complete(self, index: int, *, prefetched: bool) -> None:
        """The bytes are in the slot. Args: prefetched: nobody has waited for them."""
        assert self.states[index] == LOADING, "only what was prepared can be complete"
        self.states[index] = PREFETCHED if prefetched else RESIDENT
        self._epochs[index] = (self._epochs[index] + 1) & 0xFFFFFFFF
        self.num_resident += 1
        if self._holds[index]:
            self.num_awaited -= 1
        self.order.on_insert(index)
        if self._num_surplus:
            self._retire()

    def abandon(self, index: int) -> None:
        """The bytes do not come; the slot is free again."""
        assert self.states[index] == LOADING, "only what was prepared can be abandoned"
        slot = self._leave(index)
        if self._num_surplus:
            self._num_surplus -= 1
            self._put_away(slot)
        else:
            self._free.append(slot)

    def resize(self, num_slots: int) -> None:
        """Have so many slots from now on; what is held or on its way gives its slot back as soon as it can."""
        num_slots = min(num_slots, self.max_slots)
        growth = num_slots - self.num_slots
        self.num_slots = num_slots
        reprieved = min(max(growth, 0), self._num_surplus)
        self._num_surplus += max(-growth, 0) - reprieved
        for _ in range(growth - reprieved):
            self._free.append(self._retired.pop())
        self._retire()

    def _retire(self) -> None:
        while self._num_surplus and (self._free or self._evict_one(None)):
            self._num_surplus -= 1
            self._put_away(self._free.pop())

    def _put_away(self, slot: int) -> None:
        self._on_retire(slot)
        self._retired.append(slot)

    def _held(self) -> np.ndarray:
        return self.holds.reshape(-1) > 0

    def _evict_one(self, kept: np.ndarray | None) -> bool:
        victim = self.next_victim(kept)
        if victim is not None:
            self._evict(victim)
        return victim is not None

    def _evict(self, index: int) -> None:
        assert self.states[index] >= PREFETCHED, "only who is here can leave: a slot that is none would be given out"
        if self.states[index] == PREFETCHED:
            self.num_wasted[index // self._num_experts] += 1
        self._epochs[index] = (self._epochs[index] + 1) & 0xFFFFFFFF
        self.num_resident -= 1
        self._free.append(self._leave(index))
        self.order.on_evict(index)

    def _leave(self, index: int) -> int:
        slot = self.slots[index]
        self.states[index], self.slots[index] = ABSENT, NO_SLOT
        return slot
