"""Replays many policies on many machines over one trace.

Policy state (expert maps, activation matrices, frequencies) comes from another trace only, the past; without one the
policies start with nothing. Policies are built once for all machines that they cannot tell apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from cluster.errors import InvalidRequest
from cluster.policies.base import PolicySet
from cluster.policies.build import PRICED, PolicyContext, PolicySettings, build_policies
from cluster.policies.expert_maps.store import MapStore
from cluster.policies.future import Future, UsesToCome
from cluster.policies.next_use.estimate import NextUse
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.request_activations import ActivationTracker
from cluster.policies.signals import Grid, SignalListener
from cluster.policies.trace import GateTrace
from cluster.replay.demand import replay_demand
from cluster.replay.machine import Machine, Processor
from cluster.replay.outcome import ReplayOutcome
from cluster.replay.result import ReplayCell, summarise
from cluster.replay.schedule import ReplayStep, build_steps, grid_of, mixed_order
from cluster.replay.simulator import Simulator, run_together

PolicyBuilder = Callable[[str, PolicyContext], PolicySet]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sweep:
    """What to replay. caches: shares of all experts. links: GB/s. expert_bytes: None: as traced.

    has_ring: as in Simulator. load_cpu_s: processor time of a load, for predictors that price it.
    """

    policies: Sequence[str]
    caches: Sequence[float]
    links: Sequence[float]
    concurrencies: Sequence[int] = (1,)
    expert_bytes: int | None = None
    processor: Processor = field(default_factory=Processor)
    has_ring: bool = False
    load_cpu_s: float = 0.0
    settings: PolicySettings = field(default_factory=PolicySettings)

    @property
    def num_cells(self) -> int:
        return len(self.policies) * len(self.caches) * len(self.links) * len(self.concurrencies)


@dataclass(frozen=True, slots=True)
class Past:
    """What policies learned from an earlier trace: copied for every replay."""

    frequency: np.ndarray
    map_store: MapStore | None
    activations: ActivationTracker | None
    next_use: NextUse | None


def learn_past(trace: GateTrace, sweep: Sweep) -> Past:
    """Show an earlier trace to the policies of a sweep that learn, request by request."""
    grid, dim, settings = grid_of(trace), trace.embeddings.shape[1], sweep.settings
    parts = {part for policy in sweep.policies for part in policy.split("+")}
    store = settings.new_map_store(grid, dim) if "fmoe" in parts else None
    tracker = settings.new_tracker(grid) if "eam" in parts else None
    next_use = settings.new_next_use(grid, dim) if "moesaic" in parts else None
    frequency = np.zeros((grid.num_layers, grid.num_experts))
    for step in build_steps(trace, concurrency=1, order=mixed_order(len(trace.requests))):
        if tracker is not None:
            show(step, (tracker,))
        if next_use is not None:
            show(step, (next_use,), asked=next_use.values)
        if store is not None:
            store.insert(step.signal.embeddings, np.stack([gate.probs for gate in step.gates], axis=1))
        if step.is_decode:
            frequency += np.stack([gate.counts.sum(axis=0) for gate in step.gates])
    return Past(frequency, store, tracker, next_use)


def show(step: ReplayStep, listeners: Sequence[SignalListener], asked: Callable[[], object] = lambda: None) -> None:
    """Tell listeners all of a step, without a memory. Args: asked: called once the last gate was told."""
    step.begin(listeners)
    for row in range(len(step.gates)):
        step.pass_gate(listeners, row)
    asked()
    step.end(listeners)


def replay_cells(
    trace: GateTrace, past: Past | None, sweep: Sweep, *, build: PolicyBuilder = build_policies
) -> Iterator[ReplayCell]:
    """Replay every combination: per concurrency policy by policy, each over all caches and links.

    Raises:
        ConfigError: an unknown policy, or one that needs a past trace.
        InvalidRequest: a cache that holds no token's experts.
    """
    grid = grid_of(trace)
    for cache in sweep.caches:
        _slots(grid, cache)
    for concurrency in sweep.concurrencies:
        steps = build_steps(trace, concurrency=concurrency, order=mixed_order(len(trace.requests)))
        known = UsesToCome(grid, [needed for step in steps for needed in step.needed])
        replays = _Replays(trace, past, sweep, steps, known, build)
        for policy in sweep.policies:
            if policy.partition("+")[2] in ("", "none") and not sweep.has_ring:
                results = replays.alone(policy)
            else:
                results = (result for cache in sweep.caches for result in replays.simulated(policy, cache))
            for cache, link, outcome in results:
                yield summarise(
                    outcome,
                    policy=policy,
                    cache=cache,
                    link_gb_per_s=link,
                    concurrency=concurrency,
                    expert_bytes=replays.expert_bytes,
                )


_Result = tuple[float, float, ReplayOutcome]


class _Replays:
    """Replays of one stream of steps; each gives cache, link and outcome."""

    def __init__(
        self,
        trace: GateTrace,
        past: Past | None,
        sweep: Sweep,
        steps: Sequence[ReplayStep],
        known: UsesToCome,
        build: PolicyBuilder,
    ) -> None:
        self.expert_bytes = sweep.expert_bytes or trace.model.expert_bytes
        self._grid, self._dim = grid_of(trace), trace.embeddings.shape[1]
        self._past, self._sweep, self._steps, self._known, self._build = past, sweep, steps, known, build

    def alone(self, policy: str) -> Iterator[_Result]:
        """Without prediction or ring: all caches in one pass, all links from it."""
        sweep = self._sweep
        slots = [_slots(self._grid, cache) for cache in sweep.caches]
        policies = self._build(policy, self._context(max(slots), None))
        for cache, num_slots, run in zip(
            sweep.caches, slots, replay_demand(self._grid, policies, slots, self._steps), strict=True
        ):
            for link in sweep.links:
                yield cache, link, run.timed(self._machine(num_slots, link))

    def simulated(self, policy: str, cache: float) -> Iterator[_Result]:
        """Event by event: all links in one pass; predictors that ask for the costs of a link have each their own."""
        num_slots, sweep = _slots(self._grid, cache), self._sweep
        machines = [self._machine(num_slots, link) for link in sweep.links]
        layer_s = sweep.processor.base_s + self._grid.top_k * sweep.processor.expert_s
        meters = [CostMeter(load_s=machine.load_s, layer_s=layer_s) for machine in machines]
        for meter in meters:
            meter.cpu_s = sweep.load_cpu_s
        context = self._context(num_slots, meters[0])
        sets = [self._build(policy, context)] * len(machines)
        if policy.partition("+")[2] in PRICED:
            context = replace(context, learned=context.next_use)
            sets = [self._build(policy, replace(context, costs=meter.costs)) for meter in meters]
        simulators = [
            Simulator(self._grid, policies, machine, meter=meter, has_ring=sweep.has_ring)
            for policies, machine, meter in zip(sets, machines, meters, strict=True)
        ]
        for link, outcome in zip(sweep.links, run_together(simulators, self._steps), strict=True):
            yield cache, link, outcome

    def _machine(self, num_slots: int, link: float) -> Machine:
        """Args: link: GB/s."""
        return Machine(
            num_slots=num_slots,
            expert_bytes=self.expert_bytes,
            link_bytes_per_s=link * 1e9,
            processor=self._sweep.processor,
        )

    def _context(self, num_slots: int, meter: CostMeter | None) -> PolicyContext:
        own = copy.deepcopy(self._past)
        return PolicyContext(
            grid=self._grid,
            num_slots=num_slots,
            embedding_dim=self._dim,
            frequency=None if own is None else own.frequency,
            map_store=None if own is None else own.map_store,
            past=None if own is None else own.activations,
            learned=None if own is None else own.next_use,
            costs=None if meter is None else meter.costs,
            future=Future(self._known),
            settings=self._sweep.settings,
        )


def _slots(grid: Grid, cache: float) -> int:
    num_slots = int(cache * grid.size)
    if not grid.top_k <= num_slots <= grid.size:
        raise InvalidRequest(
            f"--cache {cache:.4g}: {num_slots} of {grid.size} experts; {grid.top_k} (one token's) to all are possible"
        )
    return num_slots
