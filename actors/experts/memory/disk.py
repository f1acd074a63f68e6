"""From the checkpoint's files into an arena: the link every expert can always take."""

from __future__ import annotations

import mmap

from actors.experts.memory.arena import RamArena
from actors.weights.reader import ExpertReader
from actors.weights.slots import SlotForm
from cluster.types import Tier


class DiskLink:
    """Reads experts, page-aligned and in chunks; one that has to be converted is read in one."""

    tier = Tier.DISK

    def __init__(self, reader: ExpertReader, form: SlotForm, arena: RamArena) -> None:
        """Args: arena: where the experts go."""
        self._reader, self._form, self._arena = reader, form, arena

    @property
    def mode(self) -> str:
        """How files are read, in words."""
        return self._reader.mode

    def has(self, index: int) -> bool:
        return True

    def num_chunks(self, index: int) -> int:
        return 1 if self._form.converts else len(self._form.plan(index).chunks)

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        plan, target = self._form.plan(index), self._arena.view(slot)
        if not self._form.converts:
            return self._reader.read(plan.chunks[chunk], target)
        staging = mmap.mmap(-1, plan.slot_bytes)
        stored = memoryview(staging)
        moved = sum(self._reader.read(part, stored) for part in plan.chunks)
        self._form.convert(index, stored, target)
        return moved

    def close(self) -> None:
        self._reader.close()
