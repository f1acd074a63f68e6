"""Chooses sequences and rows for the next step: continuous batching with chunked prefill.

Knows lengths, blocks and budgets; knows no tensors and no clock. Decoding sequences go first (one
row each), the rest of the row budget goes to prompts: first come first served, or in the order that co-batching
chooses. When KV blocks run out the youngest running sequence is preempted: its blocks are freed and it is recomputed
later from its own tokens, generated ones included, before anybody else joins.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

from actors.engine.kv_blocks import KvBlocks
from actors.engine.sequence import Sequence, SequenceState
from cluster.errors import Overloaded
from cluster.semantics.co_batching import CoBatching

_MAX_SCORED_ROWS = 64  # rows of a step that are scored against the whole vocabulary: logits are 0.6 MB each at 150,000


@dataclass(frozen=True, slots=True)
class ScheduledRows:
    """`num_rows` next tokens of a sequence, from `sequence.computed` on; the last one may be sampled."""

    sequence: Sequence
    num_rows: int

    @property
    def samples(self) -> bool:
        """Whether these rows reach the sequence's last token, so that the next one can be drawn."""
        return self.sequence.computed + self.num_rows == len(self.sequence.tokens)

    @property
    def decodes(self) -> bool:
        """Whether this is the one row that extends an answer; everything else is prefill."""
        return self.num_rows == 1 and self.sequence.computed >= len(self.sequence.request.prompt_ids)

    @property
    def num_logits(self) -> int:
        """How many of these rows, from the last one back, need logits: those of a scored prompt, else the sampled."""
        return self.num_rows if self.sequence.needs_prompt_logits else int(self.samples)


class Batcher:
    """Waiting and running sequences, and who gets rows in the next step."""

    def __init__(
        self,
        blocks: KvBlocks,
        *,
        max_batch_tokens: int,
        max_running: int,
        max_queue: int,
        co_batching: CoBatching | None = None,
    ) -> None:
        """Args: co_batching: chooses who of the waiting joins; None: who came first."""
        self.blocks = blocks
        self.co_batching = co_batching or CoBatching(max_overtaken=0)
        self.num_preemptions = 0
        self._max_batch_tokens = max_batch_tokens
        self._max_running = min(max_running, max_batch_tokens)  # every running sequence gets a row each step
        self._max_queue = max_queue
        self._waiting: deque[Sequence] = deque()
        self._running: list[Sequence] = []

    @property
    def num_waiting(self) -> int:
        return len(self._waiting)

    @property
    def num_running(self) -> int:
        return len(self._running)

    @property
    def waiting_tokens(self) -> int:
        """Prompt tokens that are not computed yet. May be asked from another thread: it looks at copies."""
        running = [sequence.num_pending for sequence in list(self._running)]
        waiting = [len(sequence.tokens) for sequence in list(self._waiting)]
        return sum(num - 1 for num in running if num > 1) + sum(waiting)

    @property
    def is_idle(self) -> bool:
        return not self._waiting and not self._running

    def add(self, sequence: Sequence) -> None:
        """Queue a sequence; one that goes on where another worker stopped comes first and is never refused.

        Raises:
            Overloaded: it would have to wait, and `max_queue` sequences wait already.
        """
        ahead = len(self._waiting) + len(self._running)
        if ahead >= self._max_running + self._max_queue and not sequence.num_generated:
            raise Overloaded(
                f"the queue is full: {len(self._running)} sequences running, {len(self._waiting)} waiting "
                f"(at most {self._max_queue}); try again later"
            )
        sequence.expected = self.co_batching.expect(sequence.request.embedding, ahead)
        if sequence.num_generated:
            self._waiting.appendleft(sequence)
        else:
            self._waiting.append(sequence)

    def finish(self, sequence: Sequence) -> None:
        """Remove a sequence in any state and free its blocks (their content stays reusable)."""
        if sequence.state is SequenceState.RUNNING:
            self._running.remove(sequence)
            self.blocks.release(sequence.blocks)
        elif sequence.state is SequenceState.WAITING and sequence in self._waiting:
            self._waiting.remove(sequence)
        sequence.blocks = []
        sequence.state = SequenceState.FINISHED

    def plan(self) -> list[ScheduledRows]:
        """Rows of the next step, decoding sequences first; empty only when there is nothing to do."""
        budget = self._max_batch_tokens
        planned: list[ScheduledRows] = []
        preemptions = self.num_preemptions
        for decoding in (True, False):
            for sequence in list(self._running):
                if sequence.state is not SequenceState.RUNNING or (sequence.num_pending == 1) is not decoding:
                    continue
                rows = _num_rows(sequence, sequence.num_pending, budget)
                if rows and self._reserve(sequence, rows, planned):
                    planned.append(ScheduledRows(sequence, rows))
                    budget -= rows
        while self._waiting and budget and len(self._running) < self._max_running:
            if self.num_preemptions > preemptions:
                break  # who was just put out must not come back before somebody finished
            place = self._next_place()
            if self._is_being_computed(self._waiting[place]):
                break  # the choices of one request: from the next step on their prompt is in the cache
            rows = self._admit(place, budget)
            if not rows:
                break
            planned.append(ScheduledRows(self._running[-1], rows))
            budget -= rows
        return [rows for rows in planned if rows.sequence.state is SequenceState.RUNNING]

    def on_computed(self, rows: ScheduledRows) -> None:
        """The rows' keys and values are in their blocks now: full blocks become reusable."""
        sequence = rows.sequence
        sequence.computed += rows.num_rows
        sequence.published = self.blocks.publish(
            sequence.tokens, sequence.blocks, sequence.computed, *sequence.published
        )

    def _next_place(self) -> int:
        """Which of the waiting is next to join."""
        if self._waiting[0].num_generated:  # who was preempted goes first
            return 0
        return self.co_batching.choose(self._waiting, self._running)

    def _admit(self, place: int, budget: int) -> int:
        """Start a waiting sequence if all its tokens find blocks without preempting anyone; returns its first rows."""
        sequence = self._waiting[place]
        cached = [] if sequence.needs_prompt_logits else self.blocks.match_prefix(sequence.tokens)
        computed = len(cached) * self.blocks.block_size
        rows = _num_rows(sequence, len(sequence.tokens) - computed, budget)
        if self.blocks.blocks_for(len(sequence.tokens) + 1) - len(cached) > self.blocks.num_free:
            self.blocks.release(cached)
            return 0
        needed = self.blocks.blocks_for(computed + rows) - len(cached)
        fresh = [block for _ in range(needed) if (block := self.blocks.allocate()) is not None]
        self.co_batching.admit(self._waiting, place)
        del self._waiting[place]
        sequence.add_blocks(cached + fresh, self.blocks.block_size)
        sequence.computed = computed
        if sequence.num_cached is None:
            sequence.num_cached = computed
        sequence.state = SequenceState.RUNNING
        self._running.append(sequence)
        return rows

    def _is_being_computed(self, sequence: Sequence) -> bool:
        """Whether a running sequence is at the same prompt and will leave blocks of it in the cache."""
        prompt = sequence.request.prompt_ids
        shared = (len(prompt) - 1) // self.blocks.block_size * self.blocks.block_size
        if not shared or sequence.needs_prompt_logits:
            return False
        return any(other.computed < shared and other.request.prompt_ids == prompt for other in self._running)

    def _reserve(self, sequence: Sequence, rows: int, planned: list[ScheduledRows]) -> bool:
        """Blocks for `rows` more tokens, preempting the youngest if need be; False if it was itself."""
        needed = self.blocks.blocks_for(sequence.computed + rows) - len(sequence.blocks)
        while needed > self.blocks.num_free:
            victim = self._running[-1]
            self._preempt(victim)
            planned[:] = [other for other in planned if other.sequence is not victim]
            if victim is sequence:
                return False
        fresh = [block for _ in range(needed) if (block := self.blocks.allocate()) is not None]
        if fresh:
            sequence.add_blocks(fresh, self.blocks.block_size)
        return True

    def _preempt(self, sequence: Sequence) -> None:
        self._running.remove(sequence)
        self.blocks.release(sequence.blocks)
        sequence.reset()
        self._waiting.appendleft(sequence)
        self.num_preemptions += 1


def _num_rows(sequence: Sequence, num_pending: int, budget: int) -> int:
    return min(num_pending, budget, _MAX_SCORED_ROWS) if sequence.needs_prompt_logits else min(num_pending, budget)
