"""From one RAM arena into another: what a GPU's link does, on a machine that has none.

Knows bytes; knows no policies. At a declared rate (`gb_per_s`) the transfer queue waits out what the copy was too fast,
and whatever it says is labelled emulated.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from actors.experts.memory.arena import RamArena
from cluster.types import Tier

_CHUNKS = 3


class RamLink:
    """As fast as memory copies."""

    tier = Tier.RAM

    def __init__(self, source: RamArena, target: RamArena, slot_of: Callable[[int], int | None]) -> None:
        """Args: slot_of: where in `source` an expert is, None if it is not there."""
        assert source.slot_bytes == target.slot_bytes
        self._source, self._target, self._slot_of = source, target, slot_of
        self._chunk_bytes = -(-source.slot_bytes // _CHUNKS)

    def has(self, index: int) -> bool:
        return self._slot_of(index) is not None

    def num_chunks(self, index: int) -> int:
        return _CHUNKS

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        source_slot = self._slot_of(index)
        assert source_slot is not None, "the store keeps it there while it is copied"
        part = slice(chunk * self._chunk_bytes, min((chunk + 1) * self._chunk_bytes, self._source.slot_bytes))
        source = np.frombuffer(self._source.view(source_slot)[part], dtype=np.uint8)
        np.copyto(np.frombuffer(self._target.view(slot)[part], dtype=np.uint8), source)
        return len(source)

    def close(self) -> None:
        """Arenas belong to the store."""
