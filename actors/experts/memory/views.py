"""The experts in the slots of one arena, as kernels and torch read them: a little for each slot, and no more.

Where an expert's parts lie in its slot depends on where they lie in their file, within a page. A view is made once for
each such pattern, and moved to a slot from there. Knows slots and offsets; knows nothing of who is resident.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping, Sequence
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

    def group(
        self, first: int, indices: Sequence[int], slots: Mapping[int, int] | memoryview
    ) -> list[tuple[int, ExpertWeights]]:
        """Experts of one layer, by their number in it. Args: first: index of expert 0. slots: by index, of each."""
        group: list[tuple[int, ExpertWeights]] = []
        by_slot, offsets = self._by_slot, self._form.part_offsets
        for index in indices:
            slot = slots[index]
            held = by_slot.get(slot)
            # Equal offsets are one object: see SlotForm.
            weights = held[1] if held is not None and held[0] is offsets[index] else self._make(index, slot)
            group.append((index - first, weights))
        return group

    def weights(self, index: int, slot: int) -> ExpertWeights:
        """The expert at a flat index, as it lies in a slot."""
        ((_, weights),) = self.group(index, (index,), {index: slot})
        return weights

    def _make(self, index: int, slot: int) -> ExpertWeights:
        offsets = self._form.part_offsets[index]
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
