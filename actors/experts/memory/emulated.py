"""From one RAM arena into another, at a declared rate: what a GPU's link does, on a machine that has none.

Whatever it says is labelled emulated. Knows bytes and a clock; knows no policies.
"""

from __future__ import annotations

import time
from collections.abc import Callable

import numpy as np

from actors.experts.memory.arena import RamArena
from cluster.types import Tier

_CHUNKS = 3
_GAP_S = 5e-4  # a later start than this begins a new burst; less is this thread waking up late


class RamLink:
    """One chunk after the other, as one direction of PCIe would; `gb_per_s` 0: as fast as memory copies."""

    tier = Tier.HOST

    def __init__(
        self, source: RamArena, target: RamArena, slot_of: Callable[[int], int | None], *, gb_per_s: float
    ) -> None:
        """Args: slot_of: where in `source` an expert is, None if it is not there."""
        assert source.slot_bytes == target.slot_bytes
        self._source, self._target, self._slot_of = source, target, slot_of
        self._bytes_per_s = gb_per_s * 1e9
        self._chunk_bytes = -(-source.slot_bytes // _CHUNKS)
        self._free_at_s = 0.0

    @property
    def is_paced(self) -> bool:
        """Whether the rate is a declared one."""
        return self._bytes_per_s > 0

    def has(self, index: int) -> bool:
        return self._slot_of(index) is not None

    def num_chunks(self, index: int) -> int:
        return _CHUNKS

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        began_s = time.perf_counter()
        source_slot = self._slot_of(index)
        assert source_slot is not None, "the store keeps it there while it is copied"
        part = slice(chunk * self._chunk_bytes, min((chunk + 1) * self._chunk_bytes, self._source.slot_bytes))
        source = np.frombuffer(self._source.view(source_slot)[part], dtype=np.uint8)
        np.copyto(np.frombuffer(self._target.view(slot)[part], dtype=np.uint8), source)
        if self._bytes_per_s:
            start_s = self._free_at_s if began_s - self._free_at_s < _GAP_S else began_s
            self._free_at_s = start_s + len(source) / self._bytes_per_s
            time.sleep(max(0.0, self._free_at_s - time.perf_counter()))
        return len(source)

    def close(self) -> None:
        """Arenas belong to the store."""
