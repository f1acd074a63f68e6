"""Replays caching alone: without prefetch what is resident depends on the memory's size only, never on its link.

So one pass over a trace serves memories of several sizes, and the times of every link follow from it in closed form:
a layer ends with all its loads done, so no layer waits for those of another. The rules are those of simulator.py.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.policies.base import PolicySet
from cluster.policies.residency import Residency
from cluster.policies.signals import Grid
from cluster.replay.link import CHUNKS_PER_EXPERT
from cluster.replay.machine import Machine
from cluster.replay.outcome import ReplayCounts, ReplayOutcome, StepLedger
from cluster.replay.schedule import ReplayStep


@dataclass(frozen=True, slots=True, kw_only=True)
class DemandRun:
    """What one memory did, layer by layer in the order of computation (N layers in all steps together).

    timely_rows, missing_rows: tokens of the experts that were resident, and of those that were loaded, of all layers
    one after the other; num_timely, num_missing: [N] how many of each. num_at_once: [N] of the missing, how many were
    asked for at the gate; the others had no slot until what was computed gave way. num_resident: at the end.
    """

    steps: Sequence[ReplayStep]
    timely_rows: list[int]
    missing_rows: list[int]
    num_timely: np.ndarray
    num_missing: np.ndarray
    num_at_once: np.ndarray
    num_resident: int

    def timed(self, machine: Machine) -> ReplayOutcome:
        """The outcome with the link and compute times of a machine."""
        outcome = ReplayOutcome(num_resident=self.num_resident)
        took_s, stall_s = self._layer_times(machine)
        shape = len(self.steps), len(took_s) // max(len(self.steps), 1)
        took_s, stall_s, timely, missed = (
            values.reshape(shape).sum(axis=1) for values in (took_s, stall_s, self.num_timely, self.num_missing)
        )
        is_decode = np.array([step.is_decode for step in self.steps], dtype=np.bool_)
        outcome.decode, outcome.prefill = (
            ReplayCounts(
                uses=int((timely + missed)[of_phase].sum()),
                timely=int(timely[of_phase].sum()),
                missed=int(missed[of_phase].sum()),
                stall_s=float(stall_s[of_phase].sum()),
            )
            for of_phase in (is_decode, ~is_decode)
        )
        outcome.demand_chunks = CHUNKS_PER_EXPERT * int(missed.sum())
        ledger = StepLedger(outcome)
        for step, step_s, count in zip(self.steps, took_s.tolist(), missed.tolist(), strict=True):
            ledger.add(step, step_s, CHUNKS_PER_EXPERT * count)
        return outcome

    def _layer_times(self, machine: Machine) -> tuple[np.ndarray, np.ndarray]:
        """[N] how long a layer takes, and how much of this is waiting."""
        num_layers, widest = len(self.num_missing), int(self.num_missing.max(initial=0))
        layer = np.repeat(np.arange(num_layers), self.num_timely)
        processor = machine.processor
        compute_of = np.array(processor.compute_s(self.timely_rows))
        at_once_s = self.num_at_once * machine.load_s
        alone_s = np.bincount(layer, compute_of, minlength=num_layers).astype(np.float64)
        end_s = processor.beside_link_s(np.zeros(num_layers), alone_s, at_once_s)  # from the gate on
        compute_s = np.zeros((num_layers, widest))
        compute_s[np.arange(widest) < self.num_missing[:, None]] = processor.compute_s(self.missing_rows)
        busy_s, stall_s = np.zeros(num_layers), np.zeros(num_layers)
        for k in range(widest):
            there = np.flatnonzero(self.num_missing > k)
            asked_s = np.where(k < self.num_at_once[there], 0.0, end_s[there])
            busy_s[there] = np.maximum(busy_s[there], asked_s) + machine.load_s
            stall_s[there] += np.maximum(busy_s[there] - end_s[there], 0)
            began_s, link_until_s = np.maximum(busy_s[there], end_s[there]), np.maximum(busy_s, at_once_s)[there]
            end_s[there] = processor.beside_link_s(began_s, compute_s[there, k], link_until_s) + processor.wake_s
        gate_s = [processor.gate_s(len(step.signal.num_rows)) for step in self.steps]
        return np.repeat(gate_s, num_layers // max(len(self.steps), 1)) + end_s, stall_s


class DemandMemory:
    """Residency of one memory, and what happened to it. residents: who is where."""

    def __init__(self, grid: Grid, policies: PolicySet, num_slots: int) -> None:
        self.residents = Residency(grid, policies.scorer, num_slots)
        self._timely_rows: list[int] = []
        self._missing_rows: list[int] = []
        self._counts: list[tuple[int, int, int]] = []  # of each layer: timely, missing, at once

    def use(self, needed: Sequence[int], rows: Sequence[int]) -> list[int]:
        """A layer needs these experts; those that had to be loaded. Args: rows: tokens of each."""
        residents = self.residents
        found = residents.lookup(needed)
        timely, missing = [needed[k] for k in found.hits], [needed[k] for k in found.missing]
        self._timely_rows += [rows[k] for k in found.hits]
        self._missing_rows += [rows[k] for k in found.missing]
        residents.touch(timely)
        at_once = self._load_all(timely, missing) if missing else 0
        self._counts.append((len(timely), len(missing), at_once))
        return missing

    def finish(self, steps: Sequence[ReplayStep]) -> DemandRun:
        """The trace is over."""
        counts = np.array(self._counts, dtype=np.int64).reshape(-1, 3)
        return DemandRun(
            steps=steps,
            timely_rows=self._timely_rows,
            missing_rows=self._missing_rows,
            num_timely=counts[:, 0],
            num_missing=counts[:, 1],
            num_at_once=counts[:, 2],
            num_resident=self.residents.num_resident,
        )

    def _load_all(self, timely: Sequence[int], missing: Sequence[int]) -> int:
        """How many found a slot at once. The others find one when what was computed gives way."""
        residents = self.residents
        residents.hold(timely)
        residents.hold(missing)
        at_once = residents.make_room(len(missing))
        for index in missing[:at_once]:
            self._load(index)
        residents.release(timely)
        residents.release(missing[:at_once])
        for index in missing[at_once:]:
            self._load(index)
            residents.release((index,))
        return at_once

    def _load(self, index: int) -> None:
        is_prepared = self.residents.prepare(index)
        assert is_prepared, "a memory holds at least one expert"
        self.residents.complete(index, prefetched=False)


def replay_demand(
    grid: Grid, policies: PolicySet, slots: Sequence[int], steps: Sequence[ReplayStep]
) -> list[DemandRun]:
    """One pass over memories of so many slots, which share the signals and the scores."""
    assert policies.predictor is None, "what is fetched ahead depends on the link"
    memories = [DemandMemory(grid, policies, num_slots) for num_slots in slots]
    for step in steps:
        step.begin(policies.listeners)
        for row in range(grid.num_layers):
            step.pass_gate(policies.listeners, row)
            needed = [row * grid.num_experts + expert for expert in step.needed[row]]
            policies.scorer.on_use(needed)
            for memory in memories:
                memory.use(needed, step.rows[row])
        step.end(policies.listeners)
    return [memory.finish(steps) for memory in memories]
