"""How many attention workers and expert hosts there should be. Pure: loads and the time in, a number out.

What is wanted follows from the load, counted in processes that it would keep busy, so that it does not change when the
number does; inside a band nothing is wanted but what there is. When to follow a wish is another matter (`follow`): more
soon, fewer only when fewer were enough for a whole cool-down, and nothing at all while nobody reports.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import ceil

from cluster.config.load import MoesaicConfig
from cluster.config.sections import SchedulerConfig
from cluster.errors import ConfigError
from cluster.status.reports import HostReport, WorkerReport

_BACKLOG_S = 5.0  # prompts that wait are to be computed within this long
_MAX_STALL_SHARE = 0.15  # of the time; what waits longer for experts wants more memory to hold them
_IDLE_LOAD = 0.05  # of one host: then it does not matter what is in memory
_EDGE = 1e-9  # of rounding: 4 * 0.2 / 0.8 is one


@dataclass(frozen=True, slots=True, kw_only=True)
class ScalingRules:
    """least, most: processes. high, low: a load above `high` of what there is wants more, below `low` fewer.

    up_after_s, down_after_s: how long without a break more, or fewer, must be wanted before they come or go.
    """

    least: int
    most: int
    high: float = 0.8
    low: float = 0.5
    up_after_s: float = 5.0
    down_after_s: float = 300.0

    def __post_init__(self) -> None:
        if not 0 <= self.least <= self.most:
            raise ConfigError(f"from {self.least} up to {self.most} processes is no range; give a larger maximum")
        if not 0 < self.low < self.high:
            raise ConfigError(f"fewer are wanted below {self.low} and more above {self.high}; low must be below high")


def worker_rules(config: MoesaicConfig) -> ScalingRules | None:
    """Of the attention workers; None if their number is fixed."""
    attention = config.attention
    return _rules(attention.workers, attention.max_workers, config.scheduler)


def host_rules(config: MoesaicConfig) -> ScalingRules | None:
    """Of the expert hosts; None if their number is fixed."""
    return _rules(config.experts.hosts, config.experts.max_hosts, config.scheduler)


def _rules(least: int, most: int | None, scheduler: SchedulerConfig) -> ScalingRules | None:
    if most is None or most <= least:
        return None
    up_after_s, down_after_s = scheduler.scale_up_after_s, scheduler.scale_down_after_s
    return ScalingRules(least=least, most=most, up_after_s=up_after_s, down_after_s=down_after_s)


@dataclass(frozen=True, slots=True)
class Scale:
    """How many there are to be. wish: the most modest of what was wanted instead, all of it more or all of it fewer,
    without a break since `since_s`; None: `target` is what is wanted."""

    target: int
    wish: int = 0
    since_s: float | None = None


def follow(scale: Scale, wanted: int | None, now_s: float, rules: ScalingRules) -> Scale:
    """The scale a moment later. Between more and fewer lie at least `down_after_s`.

    Args:
        wanted: None when nobody knows: then all stays, and waiting begins anew.

    >>> rules = ScalingRules(least=1, most=4, up_after_s=5.0)
    >>> scale = follow(Scale(target=1), 3, now_s=0.0, rules=rules)
    >>> scale.target, follow(scale, 2, now_s=5.0, rules=rules).target  # the more modest of the two wishes
    (1, 2)
    """
    target = _bounded(scale.target, rules)
    if wanted is None or target != scale.target:
        return Scale(target)
    wanted = _bounded(wanted, rules)
    if wanted == target:
        return Scale(target)
    grows = wanted > target
    since_s, wish = now_s, wanted
    if scale.since_s is not None and (scale.wish > target) is grows:
        since_s, wish = scale.since_s, (min if grows else max)(scale.wish, wanted)
    if now_s - since_s >= (rules.up_after_s if grows else rules.down_after_s):
        return Scale(wish)
    return Scale(target, wish, since_s)


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerLoad:
    """What an attention worker has to do now.

    num_sequences: running and waiting. waiting_tokens: of prompts, not computed. prefill_s: spent on prompts since
    start. prefill_token_s: of one token; 0: not known yet.
    """

    num_sequences: int
    max_running: int
    used_blocks: int
    num_blocks: int
    block_size: int
    waiting_tokens: int
    prefill_s: float
    prefill_token_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerDemand:
    """What is asked of an attention worker, in workers that it would keep busy.

    sequences: running and waiting ones over those that can run. kv: KV blocks of them. prompts: time that prompts take.
    """

    sequences: float
    kv: float
    prompts: float


def worker_demand(load: WorkerLoad, before: WorkerLoad, elapsed_s: float) -> WorkerDemand:
    """The demand on a worker now. Args: before: its load `elapsed_s` earlier."""
    prefill_share = (load.prefill_s - before.prefill_s) / elapsed_s if elapsed_s > 0 else 0.0
    return WorkerDemand(
        sequences=load.num_sequences / load.max_running,
        kv=(load.used_blocks + load.waiting_tokens / load.block_size) / load.num_blocks,
        prompts=prefill_share + load.waiting_tokens * load.prefill_token_s / _BACKLOG_S,
    )


def wanted_workers(current: int, demands: Sequence[WorkerDemand], rules: ScalingRules) -> int | None:
    """Attention workers for the load of `current` of them; None if none of them reports.

    One that does not report may be busy: fewer are not wanted on its account.

    >>> rules = ScalingRules(least=1, most=4)
    >>> busy, idle = (WorkerDemand(sequences=share, kv=0.1, prompts=0.1) for share in (0.9, 0.1))
    >>> wanted_workers(1, [busy], rules), wanted_workers(2, [busy, idle], rules), wanted_workers(2, [idle, idle], rules)
    (2, 2, 1)
    """
    if not demands:
        return None
    load = max(sum(getattr(demand, kind) for demand in demands) for kind in ("sequences", "kv", "prompts"))
    least, most = _band(load, current - len(demands), rules)
    return min(max(current, least), most)


@dataclass(frozen=True, slots=True, kw_only=True)
class HostsLoad:
    """What the expert hosts had to do in the last while.

    busy: share of the time that each computed. stall_share: of the time, spent in workers or in the slowest host on
    waiting for experts that were in no fast memory. capacity: experts that one host holds; 0: not known. num_experts:
    of the model.
    """

    busy: tuple[float, ...]
    stall_share: float
    capacity: float
    num_experts: int


def hosts_load(
    hosts: Mapping[int, tuple[HostReport, HostReport]],
    workers: Mapping[str, tuple[WorkerReport, WorkerReport]],
    elapsed_s: float,
) -> HostsLoad | None:
    """The load between two reports of each host and worker, earlier and later; None if no host was there all the time.

    Args:
        hosts: by index. workers: by id.
    """
    pairs = [(before, after) for before, after in hosts.values() if before.host_id == after.host_id]
    if not pairs or elapsed_s <= 0:
        return None
    stalls_s = [after.stall_s - before.stall_s for before, after in workers.values() if after.steps > before.steps]
    stall_s = sum(stalls_s) / len(stalls_s) if stalls_s else 0.0
    stall_s = max(stall_s, *(after.stall_s - before.stall_s for before, after in pairs))  # a step waits for the slowest
    return HostsLoad(
        busy=tuple((after.busy_s - before.busy_s) / elapsed_s for before, after in pairs),
        stall_share=stall_s / elapsed_s,
        capacity=sum(after.capacity for _, after in pairs) / len(pairs),
        num_experts=max((len(after.layers) * after.num_experts for _, after in workers.values()), default=0),
    )


def wanted_hosts(current: int, load: HostsLoad | None, rules: ScalingRules) -> int | None:
    """Expert hosts for the load of `current` of them; None if that is not known.

    Hosts are there to compute and to hold experts. While steps stall for experts that do not fit, one more is wanted,
    until all fit; and memory once found wanting is kept as long as there is anything to do.
    """
    if load is None:
        return None
    busy = sum(load.busy)
    least, most = _band(busy, current - len(load.busy), rules)
    holding_all = ceil(load.num_experts / load.capacity) if load.capacity >= 1 else current
    if load.stall_share > _MAX_STALL_SHARE and current < holding_all:
        least = max(least, current + 1)
    if busy > _IDLE_LOAD:
        most = max(most, min(current, holding_all))
    return min(max(current, least), max(least, most))


def _band(load: float, num_silent: int, rules: ScalingRules) -> tuple[int, int]:
    """The fewest and the most processes that a load wants. Args: num_silent: processes whose load is not known."""
    return ceil(load / rules.high - _EDGE), ceil((load + max(num_silent, 0)) / rules.low - _EDGE)


def _bounded(number: int, rules: ScalingRules) -> int:
    return min(max(number, rules.least), rules.most)
