"""A bounded piece of RAM in slots of one expert each, of which a part may be given back to the system.

Knows slots and bytes; knows no experts.
"""

from __future__ import annotations

import mmap

_NORESERVE = 0x4000  # MAP_NORESERVE on Linux; the mmap module has no name for it


class RamArena:
    """`max_slots` slots of address space; memory is taken as slots are written."""

    def __init__(self, num_slots: int, slot_bytes: int) -> None:
        self.max_slots = num_slots
        self.slot_bytes = slot_bytes
        # Private: huge pages are not given to shared memory, and they save a fifth of the time to stream weights.
        # Address space is not memory: a budget may be raised later, up to all slots.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _NORESERVE
        self._map = mmap.mmap(-1, max(1, num_slots) * slot_bytes, flags=flags)
        if hasattr(mmap, "MADV_HUGEPAGE"):
            self._map.madvise(mmap.MADV_HUGEPAGE)
        self.buffer = memoryview(self._map)

    def view(self, slot: int) -> memoryview:
        """The writable bytes of a slot."""
        base = slot * self.slot_bytes
        return self.buffer[base : base + self.slot_bytes]

    def release(self, slot: int) -> None:
        """Give a slot's memory back to the system; its contents are gone."""
        self._map.madvise(mmap.MADV_DONTNEED, slot * self.slot_bytes, self.slot_bytes)
