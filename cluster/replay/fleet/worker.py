"""One attention worker of a replayed fleet: its queue, its batch, its expert memory, in virtual time.

Policies, memory and co-batching are those that run live; what a step takes follows from what it computes and loads.
Nothing is fetched ahead: loads are counted, and prefetch moves them but does not save any.

Shapes: L MoE layers, E experts of a layer, N = L * E.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.policies.base import PolicySet
from cluster.policies.ring import RingPlan, ring_for_step
from cluster.policies.signals import Grid
from cluster.replay.demand import DemandMemory
from cluster.replay.machine import Machine
from cluster.replay.schedule import ReplayStep, StepPart, merge_parts
from cluster.semantics.co_batching import CoBatching
from cluster.semantics.knowledge import Knowledge
from cluster.status.reports import WorkerReport
from cluster.types import StartupPhase, Tier

_RECENT = 0.2  # weight of the last step in what a worker reports of its times


@dataclass(slots=True, eq=False)
class FleetRequest:
    """One request on its way. parts: its forward steps. embedding, expected, overtaken: as live.

    used: [L, E], how often its answer activated each expert, for the statistics.

    decode_loads, prefill_loads: its share of what was loaded for the steps it was in: a load is shared by the decoding
    sequences that needed it, or by the prompts, if no decoding one did.
    """

    number: int
    domain: str
    parts: Sequence[StepPart]
    embedding: bytes
    prompt_ids: tuple[int, ...]
    used: np.ndarray
    expected: np.ndarray | None = None
    overtaken: int = 0
    num_done: int = 0
    worker: int = -1
    arrived_s: float = 0.0
    started_s: float = 0.0
    ended_s: float = 0.0
    decode_loads: float = 0.0
    prefill_loads: float = 0.0

    @property
    def num_tokens(self) -> int:
        """Decode steps."""
        return sum(part.is_decode for part in self.parts)


class _StepScores:
    """The policy's scores, or those of the ring in a step that uses nearly every expert, as live (policy_runner.py)."""

    def __init__(self, policies: PolicySet, grid: Grid, num_slots: int) -> None:
        self._policies, self._grid, self._num_slots = policies, grid, num_slots
        self._ring: RingPlan | None = None
        self._row = -1

    def begin(self, num_rows: int) -> None:
        self._ring = ring_for_step(self._grid, self._num_slots, num_rows, self._policies.scorer.scores)
        self._row = -1

    def pass_row(self, row: int) -> None:
        self._row = row

    def on_use(self, indices: Sequence[int]) -> None:
        self._policies.scorer.on_use(indices)

    def scores(self) -> np.ndarray:
        return self._policies.scorer.scores() if self._ring is None else self._ring.outlook(self._row).scores


@dataclass(slots=True)
class WorkerCounts:
    """Since start. open_s: requests running or waiting, times seconds."""

    steps: int = 0
    tokens: int = 0
    loads: int = 0
    stall_s: float = 0.0
    busy_s: float = 0.0
    open_s: float = 0.0


@dataclass(slots=True)
class _Recent:
    step_s: float = 0.0
    prefill_token_s: float = 0.0

    def note(self, name: str, value: float) -> None:
        known = getattr(self, name)
        setattr(self, name, known + _RECENT * (value - known) if known else value)


class FleetWorker:
    """One worker. The fleet calls `begin_step`, and `end_step` when its time has come."""

    def __init__(
        self,
        index: int,
        grid: Grid,
        policies: PolicySet,
        machine: Machine,
        *,
        max_running: int,
        max_queue: int,
        co_batching: CoBatching,
    ) -> None:
        self.index = index
        self.counts = WorkerCounts()
        self.waiting: list[FleetRequest] = []
        self.running: list[FleetRequest] = []
        self.co_batching = co_batching
        self._grid, self._policies, self._machine = grid, policies, machine
        self._max_running, self._max_queue = max_running, max_queue
        self._scores = _StepScores(policies, grid, machine.num_slots)
        scored = PolicySet(self._scores, None, policies.listeners)
        self._memory = DemandMemory(grid, scored, machine.num_slots)
        self._recent = _Recent()
        self._step: ReplayStep | None = None
        self._last_s = 0.0

    @property
    def num_open(self) -> int:
        return len(self.waiting) + len(self.running)

    @property
    def is_computing(self) -> bool:
        return self._step is not None

    def set_knowledge(self, knowledge: Knowledge) -> None:
        """What is known of prompts from now on."""
        self.co_batching.set_knowledge(knowledge)

    def submit(self, request: FleetRequest, now_s: float) -> None:
        """A request was sent here."""
        self._pass_time(now_s)
        request.worker, request.arrived_s = self.index, now_s
        request.expected = self.co_batching.expect(request.embedding, self.num_open)
        self.waiting.append(request)

    def begin_step(self, now_s: float) -> float | None:
        """Compute a step; when it ends. None: nothing to do."""
        self._pass_time(now_s)
        self._admit(now_s)
        if not self.running:
            return None
        ended = tuple(r.number for r in self.running if r.num_done + 1 == len(r.parts))
        step = merge_parts([(r.number, r.parts[r.num_done]) for r in self.running], self._grid, ended)
        self._step = step
        took_s, stall_s, num_loads = self._compute(step)
        num_rows = int(step.signal.num_rows.sum())
        if step.is_decode:
            self._recent.note("step_s", took_s)
        else:
            self._recent.note("prefill_token_s", took_s / num_rows)
        self.counts.steps += 1
        self.counts.tokens += step.num_tokens
        self.counts.loads += num_loads
        self.counts.stall_s += stall_s
        self.counts.busy_s += took_s
        return now_s + took_s

    def end_step(self, now_s: float) -> list[FleetRequest]:
        """The step is over; the requests that ended with it."""
        assert self._step is not None, "after begin_step"
        self._pass_time(now_s)
        self._step = None
        for request in self.running:
            request.num_done += 1
        ended = [request for request in self.running if request.num_done == len(request.parts)]
        self.running = [request for request in self.running if request.num_done < len(request.parts)]
        for request in ended:
            request.ended_s = now_s
        return ended

    def report(self) -> WorkerReport:
        """What it tells the scheduler now."""
        grid = self._grid
        return WorkerReport(
            worker_id=str(self.index),
            replica_id=f"worker-{self.index}",
            node_id=str(self.index),
            phase=StartupPhase.READY,
            layers=grid.layers,
            num_experts=grid.num_experts,
            top_k=grid.top_k,
            num_running=len(self.running),
            num_waiting=len(self.waiting),
            max_open=self._max_running + self._max_queue,
            waiting_tokens=sum(len(request.prompt_ids) for request in self.waiting),
            steps=self.counts.steps,
            step_s=self._recent.step_s,
            prefill_token_s=self._recent.prefill_token_s,
            resident=np.packbits(self._memory.residents.resident).tobytes(),
            mix=self.co_batching.mix.to_bytes(),
            miss_s={Tier.DISK: self._machine.load_s},
            misses=self.counts.loads,
            stall_s=self.counts.stall_s,
        )

    def _pass_time(self, now_s: float) -> None:
        self.counts.open_s += self.num_open * (now_s - self._last_s)
        self._last_s = now_s

    def _admit(self, now_s: float) -> None:
        while self.waiting and len(self.running) < self._max_running:
            place = self.co_batching.choose(self.waiting, self.running)
            self.co_batching.admit(self.waiting, place)
            request = self.waiting.pop(place)
            request.started_s = now_s
            self.running.append(request)

    def _compute(self, step: ReplayStep) -> tuple[float, float, int]:
        """Seconds in all, seconds of waiting for loads, and loads."""
        machine, listeners, width = self._machine, self._policies.listeners, self._grid.num_experts
        took_s = stall_s = 0.0
        num_loads = 0
        step.begin(listeners)
        self._scores.begin(int(step.signal.num_rows.sum()))
        for row in range(self._grid.num_layers):
            step.pass_gate(listeners, row)
            self._scores.pass_row(row)
            needed = [row * width + expert for expert in step.needed[row]]
            self._scores.on_use(needed)
            missing = self._memory.use(needed, step.rows[row])
            compute_s = machine.processor.compute_s(step.rows[row])
            layer_s = sum(compute_s)
            if missing:
                # loads go one after the other while the resident ones compute; the last loaded one computes last
                waited_s = max(len(missing) * machine.load_s + compute_s[-1] - layer_s, 0.0)
                stall_s += waited_s
                layer_s += waited_s
                self._share_out(step, row, [index - row * width for index in missing])
            took_s += machine.processor.gate_s(len(step.signal.num_rows)) + layer_s
            num_loads += len(missing)
        step.end(listeners)
        return took_s, stall_s, num_loads

    def _share_out(self, step: ReplayStep, row: int, missing: list[int]) -> None:
        """Book loads to those who needed them."""
        needs = step.gates[row].counts[:, missing] > 0  # [S, missing]
        decodes = step.signal.is_decode[:, None] & needs
        by_decode = decodes.any(axis=0)
        sharers = np.where(by_decode, decodes, needs)
        shares = sharers / sharers.sum(axis=0)
        for request, decode, prefill in zip(
            self.running, shares[:, by_decode].sum(axis=1), shares[:, ~by_decode].sum(axis=1), strict=True
        ):
            request.decode_loads += float(decode)
            request.prefill_loads += float(prefill)
