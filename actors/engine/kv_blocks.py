"""Paged KV bookkeeping: which blocks a sequence owns, and which hold a prefix worth reusing.

Knows block numbers, token ids and reference counts; holds no tensors. A full block is named by the
hash of its tokens and of everything before them, so equal prefixes share blocks (as in vLLM's
automatic prefix caching). Block 0 is never given out: padding rows write there.
"""

from __future__ import annotations

import hashlib
from array import array
from collections import OrderedDict
from collections.abc import Sequence


class KvBlocks:
    """Allocates, shares and frees blocks. A freed block keeps its content until it is needed."""

    def __init__(self, num_blocks: int, block_size: int) -> None:
        self.block_size = block_size
        self.num_blocks = num_blocks - 1
        self._free: list[int] = list(range(num_blocks - 1, 0, -1))
        self._cached_free: OrderedDict[int, None] = OrderedDict()
        self._refs: dict[int, int] = {}
        self._block_by_hash: dict[bytes, int] = {}
        self._hash_by_block: dict[int, bytes] = {}

    @property
    def num_free(self) -> int:
        """Blocks that can be given out now, cached content or not."""
        return len(self._free) + len(self._cached_free)

    @property
    def num_used(self) -> int:
        return self.num_blocks - self.num_free

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold `num_tokens` tokens."""
        return -(-num_tokens // self.block_size)

    def allocate(self) -> int | None:
        """A block with one reference, or None when all are in use."""
        if self._free:
            block = self._free.pop()
        elif self._cached_free:
            block, _ = self._cached_free.popitem(last=False)
            del self._block_by_hash[self._hash_by_block.pop(block)]
        else:
            return None
        self._refs[block] = 1
        return block

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference of each; deepest first, so that short prefixes outlive long ones."""
        for block in reversed(blocks):
            self._refs[block] -= 1
            if self._refs[block]:
                continue
            del self._refs[block]
            if block in self._hash_by_block:
                self._cached_free[block] = None
            else:
                self._free.append(block)

    def match_prefix(self, token_ids: Sequence[int]) -> list[int]:
        """Blocks that already hold the longest known prefix, with one reference more each.

        At least one token is left over: its logits are needed.
        """
        matched: list[int] = []
        parent = b""
        for start in range(0, (len(token_ids) - 1) // self.block_size * self.block_size, self.block_size):
            parent = _chain(parent, token_ids[start : start + self.block_size])
            block = self._block_by_hash.get(parent)
            if block is None:
                break
            self._cached_free.pop(block, None)
            self._refs[block] = self._refs.get(block, 0) + 1
            matched.append(block)
        return matched

    def publish(
        self, token_ids: Sequence[int], blocks: Sequence[int], computed: int, start: int = 0, parent: bytes = b""
    ) -> tuple[int, bytes]:
        """Make full, computed blocks findable by `match_prefix`.

        Args:
            computed: tokens of the sequence whose keys and values are in the blocks.
            start, parent: where the last call for this sequence ended, as it returned them.
        Returns:
            Number of tokens published so far and the hash of that prefix.
        """
        while start + self.block_size <= computed:
            parent = _chain(parent, token_ids[start : start + self.block_size])
            block = blocks[start // self.block_size]
            if parent not in self._block_by_hash and block not in self._hash_by_block:
                self._block_by_hash[parent] = block
                self._hash_by_block[block] = parent
            start += self.block_size
        return start, parent

    def unpublish(self, blocks: Sequence[int]) -> None:
        """Nobody is to find these any more: what is in them is not to be trusted. Who has them keeps them."""
        for block in blocks:
            name = self._hash_by_block.pop(block, None)
            if name is not None:
                del self._block_by_hash[name]
                if block in self._cached_free:
                    del self._cached_free[block]
                    self._free.append(block)


def _chain(parent: bytes, tokens: Sequence[int]) -> bytes:
    """Name of a prefix. A strong hash: requests of different people must never share a block by collision."""
    return hashlib.blake2b(array("q", tokens).tobytes(), key=parent, digest_size=16).digest()
