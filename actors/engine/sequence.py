"""One sequence being generated: its tokens, its KV blocks and how far it is computed."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum, auto

import numpy as np

from actors.engine.token_counts import TokenCounts
from actors.engine.token_rules import TokenRules
from cluster.types import FinishReason, GenerationRequest, TokenLogprob


class SequenceState(Enum):
    """waiting -> running -> finished; back to waiting when preempted."""

    WAITING = auto()
    RUNNING = auto()
    FINISHED = auto()


@dataclass(slots=True, eq=False)
class Sequence:
    """tokens = prompt + generated, here or by an earlier worker; the first `computed` have their keys and values in the
    blocks.

    num_cached: prompt tokens found in the KV cache when first admitted; what a preempted sequence finds
    of itself later does not count, nor what one finds that an earlier worker began.
    counts: what penalties are computed from; None when there are none.
    prompt_logprobs: those of the prompt tokens scored so far, until the first token takes them along.
    expected, overtaken: for co-batching, see cluster/semantics/co_batching.py.
    rules: what the request says of tokens, prepared; None when it says nothing.
    arrived_s, queued_s: by the engine's clock, when it came; and how long it waited for its first rows, None before.
    cluster: kind of prompt that its rows are counted for (actors/gates/activation_recorder.py), -1 for none.
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
    counts: TokenCounts | None = None
    prompt_logprobs: list[TokenLogprob] = field(default_factory=list)
    expected: np.ndarray | None = None
    overtaken: int = 0
    cluster: int = -1
    arrived_s: float = 0.0
    queued_s: float | None = None
    rules: TokenRules | None = field(init=False, default=None)
    _longest_word: int = field(init=False, default=1)

    def __post_init__(self) -> None:
        if not self.tokens:
            self.tokens = [*self.request.prompt_ids, *self.request.emitted_ids]
        sampling = self.request.sampling
        self.rules = TokenRules.of(sampling)
        self._longest_word = max(map(len, sampling.bad_words), default=1)
        if sampling.has_penalties:
            self.counts = TokenCounts(self.request.prompt_ids if sampling.repetition_penalty != 1 else ())
            self.counts.add(self.request.emitted_ids)
        if self.request.emitted_ids:
            self.num_cached = 0

    @property
    def num_generated(self) -> int:
        return len(self.tokens) - len(self.request.prompt_ids)

    @property
    def num_pending(self) -> int:
        """Tokens whose keys and values are still to be computed (1 while decoding)."""
        return len(self.tokens) - self.computed

    @property
    def needs_prompt_logits(self) -> bool:
        """Whether every row to come needs logits, to score the prompt. Nothing of it may come from the prefix cache."""
        return self.request.sampling.num_prompt_logprobs is not None and self.num_generated == 0

    def append(self, token: int) -> None:
        """Take a generated token."""
        self.tokens.append(token)
        if self.counts is not None:
            self.counts.add((token,))

    def banned(self, end_tokens: tuple[int, ...]) -> tuple[int, ...]:
        """Tokens that may not come next: ends before min_tokens, and those that would complete a bad word."""
        p = self.request.sampling
        banned = (*end_tokens, *p.stop_token_ids) if self.num_generated < p.min_tokens else ()
        if self.rules is None or not p.bad_words:
            return banned
        said = min(self.num_generated, self._longest_word - 1)
        return banned + self.rules.banned(self.tokens[len(self.tokens) - said :])

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
        if self.num_generated == 0:
            self.prompt_logprobs = []
