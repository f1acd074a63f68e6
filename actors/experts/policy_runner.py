"""Tells policies what the engine computes, and the expert memory what they expect: prefetch and the order of eviction.

Search and learning run on a thread of their own, off the token path. The engine's thread only posts what its gates
said. When the searching thread falls behind, whole steps are left out. What it says late is worth less, never wrong.

Signals come in the order of SignalListener. After each the policies are asked again: for scores, which order eviction,
and for a forecast, which says what to prefetch.

A large step, of a prompt or of many sequences, uses nearly every expert. Then the ring decides, not the policies.
Source: MoESys' ring memory, see cluster/policies/ring.py.

Shapes: L MoE layers, E experts of a layer, N = L * E experts of the grid.
"""

from __future__ import annotations

import logging
import queue
import threading
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from actors.experts.memory.counters import CALIBRATION_BINS, MemoryCounters
from cluster.logs import log_event
from cluster.policies.base import PolicySet
from cluster.policies.eviction.score_snapshot import sound_scores
from cluster.policies.prefetch.base import BEFORE_FIRST, Forecast
from cluster.policies.prefetch.meter import CostMeter
from cluster.policies.prefetch.moesaic import LinkCosts
from cluster.policies.ring import RingPlan, ring_for_step
from cluster.policies.signals import GateSignal, Grid, StepSignal

_LOG = logging.getLogger(__name__)
_MAX_STEPS_BEHIND = 2
_STRIDE = 3  # layers
_MOSTLY = 0.5  # share of the time
_RING_RATE = 0.1  # weight of the newest layer in the share of experts that large steps use
Task = Callable[[], None]


class PolicyMemory(Protocol):
    """What policies steer: a process's own ExpertStore, or that of all hosts."""

    @property
    def grid(self) -> Grid: ...
    @property
    def counters(self) -> MemoryCounters: ...
    @property
    def num_slots(self) -> int:
        """Experts that it has room for."""
        ...

    @property
    def holds_everything(self) -> bool:
        """Whether nothing has to be chosen."""
        ...

    @property
    def loads_give_way(self) -> bool:
        """Whether a prefetch can let a demand go first."""
        ...

    def load_s(self) -> float:
        """Average time that one expert takes into it."""
        ...

    def load_cpu_s(self) -> float:
        """Average processor time that takes of this process."""
        ...

    def demand_s(self) -> float:
        """Seconds since start in which demands had the way into it."""
        ...

    def want(self, priority: np.ndarray | None, below: np.ndarray | None = None) -> None:
        """Replace what is to be fetched ahead: [N] float32; below: for the next tier, if not the same."""
        ...


class ScorePublisher(Protocol):
    """Takes what experts are worth to whoever evicts."""

    def publish(self, scores: np.ndarray | None = None) -> None:
        """The policy's values now. Args: scores: [N] instead of them."""
        ...


class LayerTimes(NamedTuple):
    """Of one layer, in seconds. See CostMeter.

    compute_s: computing. demand_s: on-demand loads held the link. took_s: by the clock, waiting included.
    """

    compute_s: float
    demand_s: float
    took_s: float


class PolicyRunner:
    """Between the engine's thread, which posts, and the policies, which live on the searching thread.

    num_unsound: forecasts left out, because they were not finite.
    problem: why search has ended for good, or None.
    busy_s: processor time of the searching thread, in seconds. step_s: time of the steps by the clock, in seconds.
    """

    def __init__(
        self,
        store: PolicyMemory,
        policies: PolicySet,
        publisher: ScorePublisher,
        meter: CostMeter,
        *,
        inline: bool = False,
    ) -> None:
        """Args:
        store: gets what is to be fetched.
        publisher: gets the scores by which the store evicts.
        meter: told of layers of small steps; prices prefetch.
        inline: no thread; whoever posts does the work, for tests.
        """
        self.store, self.policies, self.meter = store, policies, meter
        self.num_unsound = 0
        self.problem: str | None = None
        self.busy_s = 0.0
        self.step_s = 0.0
        self._publisher = publisher
        self._looks_ahead = policies.predictor is not None
        self._looked_ahead = False  # in the present step
        self._ring: RingPlan | None = None
        self._ring_meter = CostMeter(load_s=meter.load_s, layer_s=meter.costs().layer_s)  # large steps
        self._ring_use = 1.0  # share of a layer's experts that a large step uses
        self._forecast: Forecast | None = None
        self._foreseen: list[tuple[np.ndarray, GateSignal]] = []  # of the step: [E] probabilities, what was chosen
        self._inline = inline
        self._tasks: queue.SimpleQueue[Task | None] = queue.SimpleQueue()
        self._num_begun = self._num_ended = 0  # steps; each is counted by one thread only
        self._thread = threading.Thread(target=self._run, name="expert-search", daemon=True)
        if not inline:
            self._thread.start()

    @property
    def is_behind(self) -> bool:
        """Whether the next step is better left out."""
        return self._num_begun - self._num_ended >= _MAX_STEPS_BEHIND or self.problem is not None

    @property
    def stride(self) -> int:
        """Layers whose gates are handed over together: one as long as something is fetched ahead.

        Or steps wait more than they compute: then the search takes nothing from them.
        """
        return 1 if self._looks_ahead or self.meter.waited > _MOSTLY else _STRIDE

    @property
    def search_share(self) -> float:
        """Processor time of search and learning over the time of steps."""
        return self.busy_s / self.step_s if self.step_s else 0.0

    def post(self, task: Task) -> None:
        """Have something done by the searching thread, in order."""
        if self._inline:
            task()
        else:
            self._tasks.put(task)

    def begin_step(self, make: Callable[[], StepSignal]) -> None:
        """A step begins. Args: make: its signal; called on the searching thread."""
        self._num_begun += 1
        self._post_signal(lambda: self._on_step(make()))

    def post_gates(self, make: Callable[[], Sequence[GateSignal]], times: LayerTimes) -> None:
        """Gates have spoken.

        Args:
            make: their signals, in the order of layers; called on the searching thread.
            times: of one of these layers, on average.
        """

        def hear() -> None:
            meter = self.meter if self._ring is None else self._ring_meter
            meter.note_layer(compute_s=times.compute_s, demand_s=times.demand_s, took_s=times.took_s)
            self._on_gates(make())

        self._post_signal(hear)

    def end_step(self, step_s: float, *, is_whole: bool = True) -> None:
        """The step is over. Args: step_s: seconds that it took. is_whole: False: it broke off, nobody learns of it."""
        self.step_s += step_s
        self._post_signal(self._on_step_end if is_whole else self._on_step_broken)

    def end_sequence(self, sequence: int) -> None:
        """A sequence is over."""
        self._post_signal(lambda: self._on_sequence_end(sequence))

    def ask(
        self, question: Callable[[], dict[str, dict[str, np.ndarray]]], timeout_s: float
    ) -> dict[str, dict[str, np.ndarray]]:
        """Have the searching thread answer, between two signals: arrays by group and field, see policy state.

        Raises:
            TimeoutError: no answer within `timeout_s` seconds.
        """
        if self._inline:
            return question()
        answers: queue.SimpleQueue[dict[str, dict[str, np.ndarray]]] = queue.SimpleQueue()
        self._tasks.put(lambda: answers.put(question()))
        try:
            return answers.get(timeout=timeout_s)
        except queue.Empty:
            raise TimeoutError(f"the searching thread did not answer within {timeout_s:g} s") from None

    def close(self) -> None:
        """End the thread, after what was posted."""
        if not self._inline:
            self._tasks.put(None)
            self._thread.join(timeout=5)

    def _post_signal(self, task: Task) -> None:
        """Once search has failed, signals that wait are void. Questions are still answered."""
        self.post(lambda: None if self.problem is not None else task())

    def _run(self) -> None:
        while True:
            task = self._tasks.get()
            if task is None:
                return
            began_s = time.thread_time()
            try:
                task()
            except Exception as error:  # noqa: BLE001 - top loop: serving goes on, with the policy of no signals
                self._give_up(error)
            self.busy_s += time.thread_time() - began_s

    def _give_up(self, error: Exception) -> None:
        log_event(_LOG, logging.ERROR, "search failed; experts are evicted by recency now", error=error)
        self.problem = f"expert prediction stopped: {error!r}"
        self.store.want(None)
        self._publisher.publish(np.zeros(self.store.grid.size))

    def _on_step(self, step: StepSignal) -> None:
        grid, step = self.store.grid, step.sound()
        for listener in self.policies.listeners:
            listener.on_step(step)
        self._ring = ring_for_step(
            grid,
            self.store.num_slots,
            int(step.num_rows.sum()),
            lambda: sound_scores(self.policies.scorer.scores()),
        )
        self._costs(self.meter)
        self._look_ahead(BEFORE_FIRST)

    def _on_gates(self, gates: Sequence[GateSignal]) -> None:
        for gate in (gate.sound() for gate in gates):
            if self._forecast is not None:
                self._foreseen.append((self._forecast.probability[gate.row], gate))
            if self._ring is not None:
                used_share = float((gate.counts.max(axis=0) > 0).mean())
                self._ring_use += _RING_RATE * (used_share - self._ring_use)
            for listener in self.policies.listeners:
                listener.on_gate(gate)
        self._look_ahead(gates[-1].row)

    def _on_step_end(self) -> None:
        for listener in self.policies.listeners:
            listener.on_step_end()
        self._check_forecasts()
        self._looks_ahead, self._looked_ahead = self._looked_ahead, False
        self._num_ended += 1

    def _on_step_broken(self) -> None:
        for listener in self.policies.listeners:
            listener.on_step_broken()
        self._foreseen.clear()
        self._looked_ahead = False
        self._num_ended += 1

    def _on_sequence_end(self, sequence: int) -> None:
        for listener in self.policies.listeners:
            listener.on_sequence_end(sequence)

    def _look_ahead(self, row: int) -> None:
        """Order eviction and prefetch anew, after the gate of a row (BEFORE_FIRST: the step begins)."""
        if self._ring is not None:
            outlook = self._ring.outlook(row)
            self._forecast = None
            self._publisher.publish(outlook.scores)
            if self.policies.predictor is not None:
                pays = self._ring_use > float(self._costs(self._ring_meter).pays_from(1.0))
                self._looked_ahead |= pays
                self.store.want(outlook.ahead if pays else None, outlook.below)
            return
        self._publisher.publish()
        if self.policies.predictor is not None:
            self._forecast = self._sound(self.policies.predictor.predict(row))
            self._looked_ahead |= self._forecast is not None
            self.store.want(None if self._forecast is None else self._forecast.priority.reshape(-1))

    def _sound(self, forecast: Forecast | None) -> Forecast | None:
        """The forecast if it is finite, or None: then nothing is fetched, until the next one."""
        if forecast is None or (np.isfinite(forecast.priority).all() and np.isfinite(forecast.probability).all()):
            return forecast
        self.num_unsound += 1
        if self.num_unsound == 1:
            log_event(_LOG, logging.WARNING, "a forecast that is not finite was left out")
        return None

    def _costs(self, meter: CostMeter) -> LinkCosts:
        """What prefetch costs, by a meter, with what a load takes now."""
        meter.load_s = self.store.load_s() or meter.load_s
        meter.cpu_s = self.store.load_cpu_s()
        meter.gives_way = self.store.loads_give_way
        return meter.costs()

    def _check_forecasts(self) -> None:
        """Count by bins of probability how the last forecast of each layer came true."""
        if not self._foreseen:
            return
        counters = self.store.counters
        probability = np.concatenate([of_layer for of_layer, _ in self._foreseen])
        used = np.concatenate([gate.counts.max(axis=0) for _, gate in self._foreseen]) > 0
        self._foreseen.clear()
        bins = np.minimum((probability * CALIBRATION_BINS).astype(np.int64), CALIBRATION_BINS - 1)
        counters.num_forecasts += np.bincount(bins, minlength=CALIBRATION_BINS)
        counters.predicted += np.bincount(bins, weights=probability, minlength=CALIBRATION_BINS)
        counters.came_true += np.bincount(bins[used], minlength=CALIBRATION_BINS)
