"""Replays many policies on many machines over one trace.

Learned state (expert maps, activation matrices, frequencies) comes from another trace only, the past; without one the
policies start with nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.experts.future import Future, UsesToCome
from actors.experts.map_store import DEFAULT_CAPACITY, MapStore
from actors.experts.next_use import NextUse
from actors.experts.policies.base import PolicySet
from actors.experts.policies.build import PolicyContext, PolicySettings, build_policies
from actors.experts.request_activations import ActivationTracker
from actors.experts.signals import Grid, SignalListener
from actors.experts.trace import GateTrace
from cluster.errors import InvalidRequest
from cluster.replay.meter import CostMeter
from cluster.replay.result import ReplayCell, summarise
from cluster.replay.schedule import ReplayStep, build_steps, grid_of, mixed_order
from cluster.replay.simulator import Machine, Simulator

PolicyBuilder = Callable[[str, PolicyContext], PolicySet]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to replay. caches: shares of all experts. links: GB/s. expert_bytes: None: as traced."""

    policies: Sequence[str]
    caches: Sequence[float]
    links: Sequence[float]
    concurrencies: Sequence[int] = (1,)
    expert_bytes: int | None = None
    base_s: float = 1e-4
    expert_s: float = 1e-4
    map_capacity: int = DEFAULT_CAPACITY
    settings: PolicySettings = field(default_factory=PolicySettings)

    @property
    def num_cells(self) -> int:
        return len(self.policies) * len(self.caches) * len(self.links) * len(self.concurrencies)


@dataclass(frozen=True, slots=True)
class Past:
    """What policies learned from an earlier trace: copied for every replay."""

    frequency: np.ndarray
    map_store: MapStore
    activations: ActivationTracker
    next_use: NextUse | None


def learn_past(trace: GateTrace, sweep: Sweep) -> Past:
    """Show an earlier trace to the learning policies, request by request."""
    grid = grid_of(trace)
    store = MapStore(grid, dim=trace.embeddings.shape[1], capacity=sweep.map_capacity)
    tracker = ActivationTracker(grid, capacity=sweep.settings.eam_capacity, memory=sweep.settings.eam_memory)
    steps = build_steps(trace, concurrency=1, order=mixed_order(len(trace.requests)))
    next_use = None
    if any("moesaic" in policy for policy in sweep.policies):
        next_use = NextUse(grid, embedding_dim=trace.embeddings.shape[1])
    frequency = np.zeros((grid.num_layers, grid.num_experts))
    for step in steps:
        show(step, (tracker,))
        if next_use is not None:
            show(step, (next_use,), asked=lambda: next_use.values())
        store.insert(step.signal.embeddings, np.stack([gate.probs for gate in step.gates], axis=1))
        if step.is_decode:
            frequency += np.stack([gate.counts.sum(axis=0) for gate in step.gates])
    return Past(frequency, store, tracker, next_use)


def show(step: ReplayStep, listeners: Sequence[SignalListener], asked: Callable[[], object] = lambda: None) -> None:
    """Tell listeners all of a step, without a memory. Args: asked: called once the last gate was told."""
    for listener in listeners:
        listener.on_step(step.signal)
        for gate in step.gates:
            listener.on_gate(gate)
        asked()
        listener.on_step_end()
        for sequence in step.ended:
            listener.on_sequence_end(sequence)


def replay_cells(
    trace: GateTrace, past: Past | None, sweep: Sweep, *, build: PolicyBuilder = build_policies
) -> Iterator[ReplayCell]:
    """Replay every combination, one after the other.

    Raises:
        ConfigError: an unknown policy, or one that needs a past trace.
        InvalidRequest: a cache that holds no token's experts.
    """
    grid, dim = grid_of(trace), trace.embeddings.shape[1]
    expert_bytes = sweep.expert_bytes or trace.model.expert_bytes
    for concurrency in sweep.concurrencies:
        steps = build_steps(trace, concurrency=concurrency, order=mixed_order(len(trace.requests)))
        known = UsesToCome(grid, [needed for step in steps for needed in step.needed])
        for cache in sweep.caches:
            num_slots = _slots(grid, cache)
            for policy in sweep.policies:
                for link in sweep.links:
                    machine = Machine(
                        num_slots=num_slots,
                        expert_bytes=expert_bytes,
                        link_bytes_per_s=link * 1e9,
                        base_s=sweep.base_s,
                        expert_s=sweep.expert_s,
                    )
                    meter = CostMeter(
                        load_s=expert_bytes / machine.link_bytes_per_s,
                        layer_s=sweep.base_s + grid.top_k * sweep.expert_s,
                    )
                    context = _context(grid, dim, num_slots, past, Future(known), sweep.settings, meter)
                    outcome = Simulator(grid, build(policy, context), machine, meter=meter).run(steps)
                    yield summarise(
                        outcome,
                        policy=policy,
                        cache=cache,
                        link_gb_per_s=link,
                        concurrency=concurrency,
                        expert_bytes=expert_bytes,
                    )


def _context(
    grid: Grid, dim: int, num_slots: int, past: Past | None, future: Future, settings: PolicySettings, meter: CostMeter
) -> PolicyContext:
    own = copy.deepcopy(past)
    return PolicyContext(
        grid=grid,
        num_slots=num_slots,
        embedding_dim=dim,
        frequency=None if own is None else own.frequency,
        map_store=None if own is None else own.map_store,
        past=None if own is None else own.activations,
        learned=None if own is None else own.next_use,
        costs=meter.costs,
        future=future,
        settings=settings,
    )


def _slots(grid: Grid, cache: float) -> int:
    num_slots = int(cache * grid.size)
    if not grid.top_k <= num_slots <= grid.size:
        raise InvalidRequest(
            f"--cache {cache:.4g}: {num_slots} of {grid.size} experts; {grid.top_k} (one token's) to all are possible"
        )
    return num_slots
