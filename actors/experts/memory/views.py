"""The experts in the slots of one arena, as kernels and torch read them: a little for each slot, and no more.

Where an expert's parts lie in its slot depends on where they lie in their file, within a page. A view is made once for
each such pattern, and moved to a slot from there. Knows slots and offsets; knows nothing of who is resident.
"""

from __future__ import annotations

from collections import OrderedDict
from functools import partial

from actors.experts.memory.arena import RamArena
from actors.weights.formats.expert import ExpertWeights
from actors.weights.slots import SlotForm

SLOT_BYTES = 768
"""Of this process's memory for each slot in use: an entry here, addresses. Measured; tensors come on top."""

TENSORS_BYTES = 3_700
"""For each expert whose matrices are held as torch's tensors: those that torch has computed with. Measured."""

_MAX_PATTERNS = 512  # of parts' places within pages: as many as there can be of parts at multiples of 8 bytes

Offsets = tuple[int, ...]


def view_bytes_for(num_slots: int) -> int:
    """The most that the views of so many slots take."""
    return num_slots * (SLOT_BYTES + TENSORS_BYTES)


class ExpertViews:
    """By slot, the expert that was last asked for there."""

    def __init__(self, form: SlotForm, arena: RamArena) -> None:
        self._form, self._arena = form, arena
        self._by_slot: dict[int, tuple[Offsets, ExpertWeights]] = {}
        self._patterns: OrderedDict[Offsets, ExpertWeights] = OrderedDict()  # in slot 0; the last used last

    @property
    def num_bytes(self) -> int:
        """What all this takes now, about. From any thread."""
        views = [weights for _, weights in list(self._by_slot.values())]
        num_tensors = len(self._patterns) + sum(weights.has_tensors for weights in views)
        return len(views) * SLOT_BYTES + num_tensors * TENSORS_BYTES

    def weights(self, index: int, slot: int) -> ExpertWeights:
        """The expert at a flat index, as it lies in a slot."""
        offsets = self._form.part_offsets(index)
        held = self._by_slot.get(slot)
        if held is not None and (held[0] is offsets or held[0] == offsets):
            return held[1]
        pattern = self._pattern(index, offsets)
        weights = ExpertWeights(
            pattern.pointers.moved(slot * self._form.slot_bytes),
            pattern.intermediate,
            partial(self._form.matrices, index, slot, self._arena.buffer),
        )
        self._by_slot[slot] = (offsets, weights)
        return weights

    def keep_at_most(self, num_slots: int) -> None:
        """There are only so many slots now; what is asked for again is made again."""
        if len(self._by_slot) > num_slots:
            self._by_slot.clear()

    def _pattern(self, index: int, offsets: Offsets) -> ExpertWeights:
        pattern = self._patterns.get(offsets)
        if pattern is None:
            pattern = self._patterns[offsets] = self._form.weights(index, 0, self._arena.buffer)
            if len(self._patterns) > _MAX_PATTERNS:
                self._patterns.popitem(last=False)
        self._patterns.move_to_end(offsets)
        return pattern
