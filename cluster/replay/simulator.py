"""Replays steps in virtual time: gates, demand loads, prefetch, compute and what waits for what.

A layer: attention and gate take `base_s`, then its resident experts compute while the missing ones load; then those
that were in flight, then those that were not begun. Forecasts come in the order of their gates. What varies does so as
the machine says, alike in every replay.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Sequence

import numpy as np

from cluster.policies.base import PolicySet
from cluster.policies.eviction.score_snapshot import ScoreSnapshot
from cluster.policies.prefetch.base import BEFORE_FIRST
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.ring import RingPlan, ring_for_step, uses_nearly_all
from cluster.policies.signals import Grid
from cluster.replay.link import CHUNKS_PER_EXPERT, LinkTransfer, ReplayLink
from cluster.replay.machine import Machine
from cluster.replay.memory import ReplayMemory, WantedExperts
from cluster.replay.outcome import ReplayCounts, ReplayOutcome, StepLedger
from cluster.replay.schedule import ReplayStep


class Simulator:
    """One machine: a memory, a link, a clock.

    Five tokens of one layer choose an expert each; two experts fit, and loading one takes a millisecond:

    >>> from cluster.policies.eviction.lru import LruScorer
    >>> from cluster.replay.schedule import StepPart, merge_parts
    >>> grid, said = Grid((0,), num_experts=4, top_k=1), np.eye(4, dtype=np.float32)[[0, 1, 0, 2, 1]][:, None]
    >>> steps = [merge_parts([(0, StepPart(row, row, row[:0], row[0], 1, True))], grid, ()) for row in said]
    >>> machine = Machine(num_slots=2, expert_bytes=1000, link_bytes_per_s=1e6)
    >>> Simulator(grid, PolicySet(LruScorer(4), None, ()), machine).run(steps).decode
    ReplayCounts(uses=5, timely=1, late=0, missed=4, stall_s=0.004)
    """

    def __init__(
        self,
        grid: Grid,
        policies: PolicySet,
        machine: Machine,
        on_transfer: Callable[[LinkTransfer], None] | None = None,
        meter: CostMeter | None = None,
        *,
        has_ring: bool = False,
    ) -> None:
        """Args:
        meter: told of every layer but those of large steps, which go round the ring live.
        has_ring: large steps leave behind what the live memory's ring does, for policies that hear gates.
        """
        self.outcome = ReplayOutcome()
        self._grid, self._meter = grid, meter
        self.policies = policies
        self._processor = machine.processor
        link = ReplayLink(
            bytes_per_s=machine.link_bytes_per_s,
            chunk_bytes=machine.expert_bytes / CHUNKS_PER_EXPERT,
            on_transfer=on_transfer,
        )
        hears = bool(policies.listeners) or policies.predictor is not None
        self._snapshot = ScoreSnapshot(policies.scorer, grid.size) if has_ring and hears else None
        self._ring: RingPlan | None = None  # of a large step
        self.memory = ReplayMemory(grid, self._snapshot or policies.scorer, link, machine.num_slots)
        self._num_slots = machine.num_slots
        self._ledger = StepLedger(self.outcome)
        self._forecast_s = machine.processor.predict_s if policies.predictor is not None else 0.0
        self._random = np.random.default_rng(0)
        self._forecasts: deque[tuple[float, WantedExperts | None]] = deque()  # when each is there
        self._searched_s = 0.0  # when the last is there
        self._pace = 1.0  # of the present layer's computation
        self._gate_s = 0.0  # what its attention and gate took
        self._link_free_s = 0.0  # when the link has brought all that it waits for
        self._now_s = 0.0
        self._began_s = 0.0
        self._chunks_before = 0

    def run(self, steps: Sequence[ReplayStep]) -> ReplayOutcome:
        """Replay; a simulator runs once."""
        return run_together([self], steps)[0]

    def begin_step(self, step: ReplayStep, wanted: WantedExperts | None) -> None:
        """A step begins; `wanted` is what is to be fetched ahead of it."""
        self._plan_ring(int(step.signal.num_rows.sum()))
        self._began_s, self._chunks_before = self._now_s, self._chunks_sent()
        self._search()
        if self.policies.predictor is not None:
            self._forecasts.append((self._searched_s, wanted))

    def run_to_gate(self, num_sequences: int) -> None:
        """Attention and gate of the next layer."""
        processor, began_s, busy_s = self._processor, self._now_s, self.memory.link.busy_s_until(self._now_s)
        self._pace = self._vary(processor.spread)
        end_s = processor.beside_search_s(began_s, self._pace * processor.gate_s(num_sequences), self._searched_s)
        self._now_s = self._fetch_until(end_s, busy_s)
        self._gate_s = self._now_s - began_s
        if processor.predict_on_path:
            self._now_s += self._forecast_s
            self._fetch(self._now_s)
        self._search()

    def run_layer(self, step: ReplayStep, row: int, needed: Sequence[int]) -> float:
        """Load and compute the experts that the gate chose; when the last is done.

        Args: row: of the grid. needed: flat indices.
        """
        self._publish(row)
        rows = step.rows[row]
        memory, processor = self.memory, self._processor
        compute_s = [self._pace * alone_s for alone_s in processor.compute_s(rows)]
        demanded = memory.counters.demand_chunks
        counts = self.outcome.decode if step.is_decode else self.outcome.prefill
        end_s = self._compute(needed, compute_s, counts)
        if self._meter is not None and not uses_nearly_all(self._grid, int(step.signal.num_rows.sum())):
            self._meter.note_layer(
                compute_s=self._gate_s + sum(compute_s),
                demand_s=(memory.counters.demand_chunks - demanded) * memory.link.chunk_s,
                took_s=self._gate_s + end_s - self._now_s,
            )
        return end_s

    def end_layer(self, needed: Sequence[int], wanted: WantedExperts | None, end_s: float) -> None:
        """Fetch ahead while the layer computes, until `end_s`."""
        if self.policies.predictor is not None:
            self._forecasts.append((self._searched_s, wanted))
            end_s = self._fetch_until(end_s, self.memory.link.busy_s_until(self._link_free_s))
        self.memory.unpin(needed)
        self._now_s = end_s

    def end_step(self, step: ReplayStep) -> None:
        """All layers are done."""
        self._ledger.add(step, self._now_s - self._began_s, self._chunks_sent() - self._chunks_before)

    def finish(self) -> ReplayOutcome:
        """The replay is over."""
        self.memory.finish()
        counters, outcome = self.memory.counters, self.outcome
        outcome.demand_chunks, outcome.prefetch_chunks = counters.demand_chunks, counters.prefetch_chunks
        outcome.dropped_chunks = counters.dropped_chunks
        outcome.prefetch_used, outcome.prefetch_wasted = counters.used, counters.wasted
        outcome.num_resident = self.memory.residents.num_resident
        return outcome

    def _chunks_sent(self) -> int:
        return self.memory.counters.demand_chunks + self.memory.counters.prefetch_chunks

    def _plan_ring(self, num_rows: int) -> None:
        if self._snapshot is not None:
            self._ring = ring_for_step(self._grid, self._num_slots, num_rows, self.policies.scorer.scores)
            self._publish(BEFORE_FIRST)

    def _publish(self, row: int) -> None:
        """What experts are worth now, for eviction."""
        if self._snapshot is not None:
            self._snapshot.publish(None if self._ring is None else self._ring.outlook(row).scores)

    def _search(self) -> None:
        """Begin to make a forecast; those begun before are there first."""
        processor = self._processor
        takes_s = 0.0 if processor.predict_on_path else self._forecast_s * self._vary(processor.predict_spread)
        self._searched_s = max(self._searched_s, self._now_s + takes_s)

    def _fetch(self, until_s: float) -> None:
        """Fetch ahead until then, by the forecasts that are there."""
        while self._forecasts and self._forecasts[0][0] <= until_s:
            ready_s, wanted = self._forecasts.popleft()
            self._run_memory(ready_s)
            self.memory.want(wanted, ready_s)
        self._run_memory(until_s)

    def _run_memory(self, until_s: float) -> None:
        lag_s = self._processor.lag_s
        self.memory.run_until(until_s - (self._random.exponential(lag_s) if lag_s else 0.0))

    def _fetch_until(self, end_s: float, busy_s: float) -> float:
        """Fetch ahead while something is computed; when that ends, which takes longer beside a busy link.

        Args: end_s: when it would end with the link idle. busy_s: of the link, before.
        """
        self._fetch(end_s)
        if self._processor.contention:
            end_s += self._processor.contention * (self.memory.link.busy_s_until(end_s) - busy_s)
            self._fetch(end_s)
        return end_s

    def _vary(self, spread: float) -> float:
        """1 on average."""
        return float(self._random.lognormal(-spread * spread / 2, spread)) if spread else 1.0

    def _computed_s(self, began_s: float, alone_s: float) -> float:
        """When a computation ends, beside the search and loads that are waited for."""
        alone_s = self._processor.beside_search_s(began_s, alone_s, self._searched_s) - began_s
        return float(self._processor.beside_link_s(began_s, alone_s, self._link_free_s))

    def _compute(self, needed: Sequence[int], compute_s: Sequence[float], counts: ReplayCounts) -> float:
        memory, now_s = self.memory, self._now_s
        found = memory.begin_layer(needed)
        counts.uses += len(needed)
        counts.timely += len(found.hits)
        counts.late += len(found.pending)
        counts.missed += len(found.missing)
        arrives_s: dict[int, float] = {}
        for k in found.demand_order:
            arrival_s = memory.load(needed[k], now_s)
            if arrival_s is None:
                break
            arrives_s[k] = arrival_s
        self._link_free_s = memory.link.busy_until_s if arrives_s else now_s
        alone_s = sum([compute_s[k] for k in found.hits])
        end_s, computed, waited = self._computed_s(now_s, alone_s), found.hits, False
        for k in found.demand_order:
            if k not in arrives_s:  # more is needed than fits: what was computed gives way
                memory.unpin([needed[done] for done in computed])
                arrival_s = memory.load(needed[k], end_s)
                assert arrival_s is not None, "a memory holds at least one expert"
                arrives_s[k] = self._link_free_s = arrival_s
            memory.residents.touch((needed[k],))
            waited = arrives_s[k] > end_s
            if waited:
                counts.stall_s += arrives_s[k] - end_s
                end_s = arrives_s[k]
            end_s = self._computed_s(end_s, compute_s[k]) + self._processor.wake_s
            computed = [*computed, k]
        if waited:  # for the last, which alone is being computed from then on
            memory.unpin([needed[done] for done in computed[:-1]])
        return end_s


def run_together(simulators: Sequence[Simulator], steps: Sequence[ReplayStep]) -> list[ReplayOutcome]:
    """One pass over a trace. What machines share of their policies is told once and asked once: what listeners,
    scorers and predictors hear does not depend on the machine."""
    sets = [simulator.policies for simulator in simulators]
    listeners = list({id(part): part for policies in sets for part in policies.listeners}.values())
    scorers = list({id(policies.scorer): policies.scorer for policies in sets}.values())
    for step in steps:
        step.begin(listeners)
        for simulator, wanted in zip(simulators, _wanted(sets, BEFORE_FIRST), strict=True):
            simulator.begin_step(step, wanted)
        for row, gate in enumerate(step.gates):
            for simulator in simulators:
                simulator.run_to_gate(len(step.signal.num_rows))
            step.pass_gate(listeners, row)
            first = row * gate.probs.shape[1]
            needed = [first + expert for expert in step.needed[row]]
            for scorer in scorers:
                scorer.on_use(needed)
            ends_s = [simulator.run_layer(step, row, needed) for simulator in simulators]
            for simulator, wanted, end_s in zip(simulators, _wanted(sets, row), ends_s, strict=True):
                simulator.end_layer(needed, wanted, end_s)
        for simulator in simulators:
            simulator.end_step(step)
        step.end(listeners)
    return [simulator.finish() for simulator in simulators]


def _wanted(sets: Sequence[PolicySet], row: int) -> list[WantedExperts | None]:
    """What each of the predictors wants after a gate."""
    known: dict[int, WantedExperts | None] = {}
    for policies in sets:
        predictor = policies.predictor
        if id(predictor) not in known:
            forecast = None if predictor is None else predictor.predict(row)
            known[id(predictor)] = None if forecast is None else WantedExperts(forecast)
    return [known[id(policies.predictor)] for policies in sets]
