"""The way of an expert one tier up, chunk by chunk.

Knows bytes and where they lie; knows nothing of priorities or policies. Experts are flat indices (signals.Grid).
"""

from __future__ import annotations

from typing import Protocol

from cluster.types import Tier


class MemoryLink(Protocol):
    """From one tier into the slots of the arena above it. Called from the threads of a transfer queue, several at once.

    tier: where the experts come from.
    """

    tier: Tier

    def has(self, index: int) -> bool:
        """Whether the expert can be had from this tier now; cheap, called under the store's lock."""
        ...

    def num_chunks(self, index: int) -> int:
        """In how many parts an expert is moved: between two of them a demand may go first."""
        ...

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        """Move one part of an expert into a slot; bytes moved. Blocks until it is there.

        Raises:
            ExpertReadError: it cannot be had; names the file or the node.
        """
        ...

    def close(self) -> None:
        """Give up what it holds."""
        ...
