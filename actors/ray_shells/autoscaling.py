"""Ray Serve's side of scaling: the autoscaling policy of the attention workers, and the numbers it decides by.

Every worker measures what is asked of it; Serve carries the numbers to its controller, which calls the policy there.
The decision itself is pure (cluster/scaling/rules.py); Serve's own delays are off, so that there is one hysteresis.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from ray.serve.config import AutoscalingConfig, AutoscalingContext, AutoscalingPolicy

from cluster.config.load import MoesaicConfig
from cluster.scaling.rules import (
    Scale,
    ScalingRules,
    WorkerDemand,
    WorkerLoad,
    follow,
    wanted_workers,
    worker_demand,
    worker_rules,
)
from cluster.types import StartupPhase

if TYPE_CHECKING:
    from actors.attention.worker import AttentionWorker

_LOOK_BACK_S = 10.0  # Serve averages over it, and asks each worker five times in it
_KINDS = ("sequences", "kv", "prompts")
_PREFIX = "demand_"
_STATE = "scale"


def worker_autoscaling(config: MoesaicConfig) -> AutoscalingConfig | None:
    """Serve's options for `attention.max_workers`; None if the number of workers is fixed."""
    rules = worker_rules(config)
    if rules is None:
        return None
    return AutoscalingConfig(
        min_replicas=rules.least,
        initial_replicas=rules.least,
        max_replicas=rules.most,
        look_back_period_s=_LOOK_BACK_S,
        upscale_delay_s=0,
        downscale_delay_s=0,
        policy=AutoscalingPolicy(policy_function=WorkerScaling, policy_kwargs=asdict(rules)),
    )


class WorkerScaling:
    """The policy: Serve makes one on its controller, from JSON, and calls it ten times a second."""

    def __init__(self, **rules: Any) -> None:
        """Args: rules: fields of ScalingRules."""
        self._rules = ScalingRules(**rules)

    def __call__(self, context: AutoscalingContext) -> tuple[int, dict[str, Any]]:
        """The number of workers, and the state to be called with the next time."""
        scale = Scale(**context.policy_state.get(_STATE, {"target": context.target_num_replicas}))
        if scale.target != context.target_num_replicas:  # somebody else has set it
            scale = Scale(context.target_num_replicas)
        wanted = wanted_workers(scale.target, _reported_demands(context), self._rules)
        now_s = time.time() if context.current_time is None else context.current_time
        scale = follow(scale, wanted, now_s, self._rules)
        return scale.target, {_STATE: asdict(scale)}


class DemandMeter:
    """Measures one worker between two questions of Serve."""

    def __init__(self, load: Callable[[], WorkerLoad | None], clock: Callable[[], float] = time.monotonic) -> None:
        """Args: load: None while the worker starts."""
        self._load, self._clock = load, clock
        self._before: tuple[float, WorkerLoad] | None = None

    def stats(self) -> dict[str, float]:
        """For `record_autoscaling_stats`; empty while there is nothing to tell, which Serve takes for no answer."""
        load, now_s = self._load(), self._clock()
        if load is None:
            return {}
        before_s, before = self._before or (now_s, load)
        self._before = now_s, load
        demand = worker_demand(load, before, now_s - before_s)
        return {_PREFIX + kind: value for kind, value in asdict(demand).items()}


def _reported_demands(context: AutoscalingContext) -> list[WorkerDemand]:
    """Of the replicas whose numbers are all there, averaged over the look-back by Serve."""
    metrics = context.aggregated_metrics or {}
    by_kind = {kind: metrics.get(_PREFIX + kind, {}) for kind in _KINDS}
    replicas: Iterable[Any] = set.intersection(*(set(values) for values in by_kind.values()))
    return [WorkerDemand(**{kind: by_kind[kind][replica] for kind in _KINDS}) for replica in replicas]


def worker_load(worker: AttentionWorker, max_running: int) -> WorkerLoad | None:
    """What a worker has to do now; None while it starts. Args: max_running: sequences that may run together."""
    parts = worker.parts
    if parts is None or worker.phase is not StartupPhase.READY:
        return None
    batcher, times = parts.engine.batcher, parts.engine.times
    return WorkerLoad(
        num_sequences=worker.num_open,
        max_running=max_running,
        used_blocks=batcher.blocks.num_used,
        num_blocks=batcher.blocks.num_blocks,
        block_size=batcher.blocks.block_size,
        waiting_tokens=batcher.waiting_tokens,
        prefill_s=times.prefill_s,
        prefill_token_s=times.prefill_token_s,
    )
