"""Which prompts a router has sent where, block by block: what a worker's KV cache may still hold. Pure.

Each router remembers what it sent itself. Workers forget blocks without telling; the bound on the memory stands for
theirs, so it should not be larger than what their KV caches hold together.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

DEFAULT_BLOCK_SIZE = 16


def block_hashes(token_ids: Sequence[int], block_size: int = DEFAULT_BLOCK_SIZE) -> tuple[int, ...]:
    """A hash for every full block that could be reused; it stands for the block and all before it.

    The last token never counts: it has to be computed for its logits. Comparable within one process.
    """
    hashes: list[int] = []
    known = 0
    for start in range(0, (len(token_ids) - 1) // block_size * block_size, block_size):
        known = hash((known, tuple(token_ids[start : start + block_size])))
        hashes.append(known)
    return tuple(hashes)


class PrefixMemory:
    """Blocks by hash, and the replicas that they were sent to; the blocks used longest ago are forgotten first."""

    def __init__(self, capacity: int) -> None:
        """Args: capacity: blocks."""
        self._capacity = capacity
        self._replicas: OrderedDict[int, set[str]] = OrderedDict()

    def __len__(self) -> int:
        return len(self._replicas)

    def note(self, blocks: Sequence[int], replica_id: str) -> None:
        """A prompt of these blocks was sent to a replica."""
        for block in reversed(
            blocks
        ):  # so that of a prompt the end is forgotten first: without its beginning it is void
            self._replicas.setdefault(block, set()).add(replica_id)
            self._replicas.move_to_end(block)
        while len(self._replicas) > self._capacity:
            self._replicas.popitem(last=False)

    def num_cached(self, blocks: Sequence[int]) -> dict[str, int]:
        """How many blocks of a prompt, from its beginning, each replica got; those that got none are left out."""
        found: dict[str, int] = {}
        for number, block in enumerate(blocks, 1):
            holders = self._replicas.get(block)
            if not holders:
                break
            going_on = [replica for replica in holders if found.get(replica, 0) == number - 1]
            if not going_on:
                break
            for replica in going_on:
                found[replica] = number
        return found

    def forget(self, replica_ids: frozenset[str]) -> None:
        """These replicas are gone, and their caches with them."""
        for block, holders in list(self._replicas.items()):
            holders -= replica_ids
            if not holders:
                del self._replicas[block]
