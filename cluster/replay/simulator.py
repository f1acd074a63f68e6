"""Replays steps in virtual time: gates, demand loads, prefetch, compute and what waits for what.

A layer: attention and gate take `base_s`, then its resident experts compute while the missing ones load; then those
that were in flight, then those that were not begun. An expert takes `expert_s`, or `row_s` a token if that is more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from actors.experts.policies.base import PolicySet
from actors.experts.predict.base import BEFORE_FIRST
from actors.experts.signals import Grid
from cluster.replay.link import CHUNKS_PER_EXPERT, Link, Transfer
from cluster.replay.memory import ReplayMemory
from cluster.replay.meter import CostMeter
from cluster.replay.schedule import ReplayStep


@dataclass(frozen=True, slots=True, kw_only=True)
class Machine:
    """The machine that is simulated. The defaults are the demo model widened 32 times on one core (measured)."""

    num_slots: int
    expert_bytes: int
    link_bytes_per_s: float
    base_s: float = 1e-4
    expert_s: float = 1e-4
    row_s: float = 1e-5


@dataclass(slots=True)
class ReplayCounts:
    """Counts of decode steps (or of those with prompts), in distinct experts of a layer and step.

    timely: resident when the gate chose them. late: on their way. missed: neither. stall_s: compute waited for them.
    """

    uses: int = 0
    timely: int = 0
    late: int = 0
    missed: int = 0
    stall_s: float = 0.0


@dataclass(slots=True)
class ReplayOutcome:
    """What a replay gave. token_s: time of the step of every decoded token. ttft_s: from joining to the first token."""

    decode: ReplayCounts = field(default_factory=ReplayCounts)
    prefill: ReplayCounts = field(default_factory=ReplayCounts)
    num_tokens: int = 0
    total_s: float = 0.0
    token_s: list[float] = field(default_factory=list[float])
    ttft_s: list[float] = field(default_factory=list[float])
    demand_chunks: int = 0
    prefetch_chunks: int = 0
    decode_chunks: int = 0
    dropped_chunks: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    num_resident: int = 0


class Simulator:
    """One memory, one link, one stream of steps."""

    def __init__(
        self,
        grid: Grid,
        policies: PolicySet,
        machine: Machine,
        on_transfer: Callable[[Transfer], None] | None = None,
        meter: CostMeter | None = None,
    ) -> None:
        """Args: meter: told of every layer."""
        self._meter = meter
        self._grid = grid
        self._policies = policies
        self._machine = machine
        link = Link(
            bytes_per_s=machine.link_bytes_per_s,
            chunk_bytes=machine.expert_bytes / CHUNKS_PER_EXPERT,
            on_transfer=on_transfer,
        )
        self.memory = ReplayMemory(grid, policies.eviction, link, machine.num_slots)
        self._now_s = 0.0

    def run(self, steps: Sequence[ReplayStep]) -> ReplayOutcome:
        """Replay; a simulator runs once."""
        outcome = ReplayOutcome()
        waiting: dict[int, float] = {}
        for step in steps:
            began_s, chunks_before = self._now_s, self._chunks_sent()
            self._run_step(step, outcome.decode if step.is_decode else outcome.prefill)
            took_s = self._now_s - began_s
            for sequence, decodes in zip(step.signal.sequences, step.signal.is_decode, strict=True):
                if decodes:
                    outcome.token_s.append(took_s)
                    if sequence in waiting:
                        outcome.ttft_s.append(waiting.pop(sequence))
                else:
                    waiting[sequence] = waiting.get(sequence, 0.0) + took_s
            outcome.num_tokens += step.num_tokens
            if step.is_decode:
                outcome.decode_chunks += self._chunks_sent() - chunks_before
            for sequence in step.ended:
                if sequence in waiting:
                    outcome.ttft_s.append(waiting.pop(sequence))
                for listener in self._policies.listeners:
                    listener.on_sequence_end(sequence)
        self.memory.finish()
        counters = self.memory.counters
        outcome.total_s = self._now_s
        outcome.demand_chunks, outcome.prefetch_chunks = counters.demand_chunks, counters.prefetch_chunks
        outcome.dropped_chunks = counters.dropped_chunks
        outcome.prefetch_used, outcome.prefetch_wasted = counters.used, counters.wasted
        outcome.num_resident = self.memory.num_resident
        return outcome

    def _chunks_sent(self) -> int:
        return self.memory.counters.demand_chunks + self.memory.counters.prefetch_chunks

    def _run_step(self, step: ReplayStep, counts: ReplayCounts) -> None:
        listeners, predictor = self._policies.listeners, self._policies.predictor
        memory = self.memory
        for listener in listeners:
            listener.on_step(step.signal)
        if predictor is not None:
            memory.pin(())
            memory.want(predictor.predict(BEFORE_FIRST), self._now_s)
        for row, gate in enumerate(step.gates):
            self._now_s += self._machine.base_s
            memory.run_until(self._now_s)
            for listener in listeners:
                listener.on_gate(gate)
            first = row * self._grid.num_experts
            needed = [first + expert for expert in step.needed[row]]
            compute = [max(self._machine.expert_s, n * self._machine.row_s) for n in step.rows[row]]
            demanded = memory.counters.demand_chunks
            end_s = self._run_layer(dict(zip(needed, compute, strict=True)), counts)
            if self._meter is not None:
                self._meter.note_layer(
                    compute_s=self._machine.base_s + sum(compute),
                    demand_s=(memory.counters.demand_chunks - demanded) * memory.link.chunk_s,
                    took_s=self._machine.base_s + end_s - self._now_s,
                )
            if predictor is not None:
                memory.pin(needed)
                memory.want(predictor.predict(row), self._now_s)
                memory.run_until(end_s)
            self._now_s = end_s
        for listener in listeners:
            listener.on_step_end()

    def _run_layer(self, compute_s: dict[int, float], counts: ReplayCounts) -> float:
        """Use and load the needed experts; when the last is computed."""
        memory, now_s = self.memory, self._now_s
        resident = [index for index in compute_s if memory.is_resident(index)]
        coming = [index for index in compute_s if memory.is_coming(index)]
        missing = [index for index in compute_s if not memory.is_resident(index) and not memory.is_coming(index)]
        counts.uses += len(compute_s)
        counts.timely += len(resident)
        counts.late += len(coming)
        counts.missed += len(missing)
        memory.pin(list(compute_s))
        end_s = now_s
        for index in resident:
            memory.use(index)
            end_s += compute_s[index]
        computed = resident
        for index in coming + missing:
            arrives_s = memory.load(index, now_s)
            if arrives_s is None:  # more is needed than fits: what was computed gives way
                for done in computed:
                    memory.unpin(done)
                arrives_s = memory.load(index, end_s)
                assert arrives_s is not None, "a memory holds at least one expert"
            memory.use(index)
            counts.stall_s += max(0.0, arrives_s - end_s)
            end_s = max(end_s, arrives_s) + compute_s[index]
            computed = [*computed, index]
        return end_s
