"""One sequence being generated: its tokens, its KV blocks and how far it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from cluster.types import FinishReason, GenerationRequest


class SequenceState(Enum):
    """waiting -> running -> finished; back to waiting when preempted."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """tokens = prompt + generated; the first `computed` have their keys and values in the blocks.

    num_cached: prompt tokens found in the KV cache when first admitted; what a preempted sequence finds
    of itself later does not count.
    """

    request: GenerationRequest
    tokens: list[int] = field(default_factory=list)
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    num_cached: int | None = None
    published: tuple[int, bytes] = (0, b"")
    state: SequenceState = SequenceState.WAITING
    finish_reason: FinishReason | None = None
    slots: np.ndarray = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = list(self.request.prompt_ids)

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed (1 while decoding)."""
        return len(self.tokens) - self.computed

    def add_blocks(self, blocks: list[int], block_size: int) -> None:
        """Append KV blocks and the slots they consist of."""
        self.blocks.extend(blocks)
        fresh = (np.asarray(blocks, dtype=np.int64)[:, None] * block_size + np.arange(block_size)).reshape(-1)
        self.slots = np.concatenate((self.slots, fresh))

    def reset(self) -> None:
        """Forget everything computed; the tokens stay, so nothing emitted is lost."""
        self.blocks, self.computed, self.published = [], 0, (0, b"")
        self.slots = np.empty(0, dtype=np.int64)
        self.state = SequenceState.WAITING
