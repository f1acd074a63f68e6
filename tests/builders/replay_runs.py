"""Replays of made-up traces, watched: every transfer, and what the memory does with its order of eviction."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
from trace_builders import DIM

from cluster.policies.base import PolicySet, Scorer
from cluster.policies.build import PolicyContext, build_policies
from cluster.policies.eviction.eviction_order import EvictionOrder
from cluster.policies.future import Future, UsesToCome
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.signals import Grid
from cluster.policies.trace import GateTrace
from cluster.replay.link import LinkTransfer
from cluster.replay.machine import Machine, Processor
from cluster.replay.outcome import ReplayOutcome
from cluster.replay.schedule import ReplayStep, build_steps, grid_of
from cluster.replay.simulator import Simulator


class WatchedOrder(EvictionOrder):
    """Also counts what the memory does with it."""

    def __init__(self, scorer: Scorer, size: int, num_slots: int) -> None:
        super().__init__(scorer, size)
        self.num_slots = num_slots
        self.resident: set[int] = set()
        self.inserts = 0

    def on_insert(self, index: int) -> None:
        assert index not in self.resident
        self.resident.add(index)
        self.inserts += 1
        assert len(self.resident) <= self.num_slots
        super().on_insert(index)

    def on_evict(self, index: int) -> None:
        self.resident.remove(index)
        super().on_evict(index)


@dataclass
class Run:
    outcome: ReplayOutcome
    transfers: list[LinkTransfer]
    watched: WatchedOrder
    machine: Machine


def steps_of(trace: GateTrace, concurrency: int = 1) -> list[ReplayStep]:
    return build_steps(trace, concurrency=concurrency, order=range(len(trace.requests)))


def policies_of(policy: str, grid: Grid, steps: Sequence[ReplayStep], slots: int, meter: CostMeter) -> PolicySet:
    future = Future(UsesToCome(grid, [needed for step in steps for needed in step.needed]))
    frequency = np.arange(grid.size, dtype=float).reshape(grid.num_layers, -1)
    return build_policies(
        policy,
        PolicyContext(
            grid=grid, num_slots=slots, embedding_dim=DIM, frequency=frequency, future=future, costs=meter.costs
        ),
    )


def run_trace(
    trace: GateTrace, policy: str, *, slots: int, rate: float = 1e9, concurrency: int = 1, **processor: float
) -> Run:
    grid, steps = grid_of(trace), steps_of(trace, concurrency)
    simulated = Machine(
        num_slots=slots, expert_bytes=3000, link_bytes_per_s=rate, processor=replace(Processor(), **processor)
    )
    meter = CostMeter(load_s=simulated.load_s, layer_s=3e-4)
    policies = policies_of(policy, grid, steps, slots, meter)
    transfers: list[LinkTransfer] = []
    simulator = Simulator(grid, policies, simulated, transfers.append, meter)
    simulator.memory.residents.order = watched = WatchedOrder(policies.scorer, grid.size, slots)
    return Run(simulator.run(steps), transfers, watched, simulated)
