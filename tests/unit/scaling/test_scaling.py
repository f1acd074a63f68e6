"""How many workers and hosts: bounded, monotone in the load, settled under a constant one, slow to shrink."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import ConfigError
from cluster.scaling.rules import (
    HostsLoad,
    Scale,
    ScalingRules,
    WorkerDemand,
    WorkerLoad,
    follow,
    hosts_load,
    wanted_hosts,
    wanted_workers,
    worker_demand,
)
from cluster.status.reports import HostReport, WorkerReport
from cluster.types import StartupPhase

RULES = ScalingRules(least=1, most=8, up_after_s=5, down_after_s=60)
IDLE = WorkerDemand(sequences=0, kv=0, prompts=0)

_loads = st.floats(0, 20)
_demands = st.builds(WorkerDemand, sequences=_loads, kv=_loads, prompts=_loads)
_hosts_loads = st.builds(
    HostsLoad,
    busy=st.lists(st.floats(0, 1), min_size=1, max_size=8).map(tuple),
    stall_share=st.floats(0, 1),
    capacity=st.floats(0, 100),
    num_experts=st.integers(0, 400),
)
_bounds = st.tuples(st.integers(1, 8), st.integers(0, 8)).map(lambda b: ScalingRules(least=b[0], most=b[0] + b[1]))
_wishes = st.lists(
    st.tuples(st.floats(0.1, 30), st.one_of(st.none(), st.integers(0, 12))), min_size=1, max_size=60
)  # seconds since the last one, and what is wanted then


def _spread(load: float, num: int) -> list[WorkerDemand]:
    """A load shared by so many workers."""
    return [WorkerDemand(sequences=load / num, kv=0.3 * load / num, prompts=0)] * num


@given(_bounds, _wishes)
def test_the_scale_stays_within_bounds_and_only_moves_towards_what_is_wanted(
    rules: ScalingRules, wishes: list[tuple[float, int | None]]
) -> None:
    scale, now_s = Scale(rules.least), 0.0
    for wait_s, wanted in wishes:
        now_s += wait_s
        before, scale = scale, follow(scale, wanted, now_s, rules)
        assert rules.least <= scale.target <= rules.most
        if scale.target != before.target:
            assert wanted is not None and (scale.target > before.target) is (wanted > before.target)
            assert abs(scale.target - before.target) <= abs(wanted - before.target)


@given(_wishes)
def test_nothing_shrinks_within_the_cool_down_of_a_growth_or_of_another_shrinking(
    wishes: list[tuple[float, int | None]],
) -> None:
    scale, now_s, changed_s = Scale(4), 0.0, 0.0
    for wait_s, wanted in wishes:
        now_s += wait_s
        before, scale = scale, follow(scale, wanted, now_s, RULES)
        if scale.target < before.target:
            assert now_s - changed_s >= RULES.down_after_s
        if scale.target != before.target:
            changed_s = now_s


@given(st.floats(0, 30), st.integers(1, 8), st.sampled_from((0.5, 1.0, 7.0)))
def test_a_constant_load_is_settled_on_and_then_nothing_changes(load: float, start: int, every_s: float) -> None:
    scale, now_s, targets = Scale(start), 0.0, []
    for _ in range(int(400 / every_s)):
        now_s += every_s
        wanted = wanted_workers(scale.target, _spread(load, scale.target), RULES)
        scale = follow(scale, wanted, now_s, RULES)
        targets.append(scale.target)
    changes = [(a, b) for a, b in zip([start, *targets], targets, strict=False) if a != b]
    assert len(changes) <= 1, "one step is enough, up or down"
    settled = targets[-1]
    assert settled == RULES.most or load / settled <= RULES.high + 1e-6
    assert settled == RULES.least or load / (settled - 1) > RULES.low - 1e-6 or settled == start


@given(st.integers(1, 20), st.lists(_demands, min_size=1, max_size=8), st.floats(1, 3))
def test_more_load_never_wants_fewer_workers(current: int, demands: list[WorkerDemand], factor: float) -> None:
    more = [WorkerDemand(sequences=d.sequences * factor, kv=d.kv * factor, prompts=d.prompts * factor) for d in demands]
    fewer, wanted = wanted_workers(current, demands, RULES), wanted_workers(current, more, RULES)
    assert fewer is not None and wanted is not None and fewer <= wanted


@given(st.integers(1, 12), _hosts_loads, st.floats(1, 3), st.floats(0, 1))
def test_more_load_or_more_stalls_never_want_fewer_hosts(
    current: int, load: HostsLoad, factor: float, stalls: float
) -> None:
    more = replace(load, busy=tuple(b * factor for b in load.busy), stall_share=max(stalls, load.stall_share))
    fewer, wanted = wanted_hosts(current, load, RULES), wanted_hosts(current, more, RULES)
    assert fewer is not None and wanted is not None and fewer <= wanted


def test_missing_reports_hold_the_scale_and_a_silent_worker_is_not_taken_for_idle() -> None:
    assert wanted_workers(3, [], RULES) is None
    assert wanted_hosts(3, None, RULES) is None
    assert wanted_workers(3, [IDLE] * 3, RULES) == 0
    assert wanted_workers(3, [IDLE] * 2, RULES) == 2, "the third may be full"
    assert wanted_workers(2, [replace(IDLE, kv=3.9)], RULES) == 5, "more is wanted whoever is silent"
    waiting = follow(Scale(3), 1, 0.0, RULES)
    waiting = follow(waiting, None, 50.0, RULES)
    assert follow(waiting, 1, 61.0, RULES).target == 3, "the cool-down begins anew"


def test_a_burst_brings_what_it_wants_in_seconds_and_the_most_modest_of_it() -> None:
    scale = follow(Scale(1), 6, 0.0, RULES)
    scale = follow(scale, 3, 2.0, RULES)
    assert scale.target == 1
    assert follow(scale, 5, 5.0, RULES) == Scale(3)
    assert follow(Scale(1), 6, 0.0, replace(RULES, up_after_s=0)) == Scale(6)


def test_changed_bounds_are_kept_at_once() -> None:
    assert follow(Scale(9), 9, 0.0, RULES).target == RULES.most
    assert follow(Scale(1), None, 0.0, replace(RULES, least=2)).target == 2


def test_waiting_prompts_count_by_the_time_and_by_the_memory_that_they_take() -> None:
    idle = WorkerLoad(
        num_sequences=0,
        max_running=32,
        used_blocks=0,
        num_blocks=1000,
        block_size=16,
        waiting_tokens=0,
        prefill_s=5.0,
        prefill_token_s=0.001,
    )
    waiting = replace(idle, waiting_tokens=10_000)
    assert worker_demand(idle, idle, 2.0) == IDLE
    assert worker_demand(replace(idle, num_sequences=64), idle, 2.0).sequences == 2
    assert worker_demand(replace(idle, used_blocks=500, waiting_tokens=8000), idle, 2.0).kv == 1
    assert worker_demand(waiting, idle, 2.0).prompts == pytest.approx(2), "10 s of work, in 5 s"
    assert worker_demand(replace(waiting, prefill_token_s=0.0), idle, 2.0).prompts == 0, "not measured yet"
    assert worker_demand(replace(idle, prefill_s=6.4), idle, 2.0).prompts == pytest.approx(0.7)
    assert worker_demand(idle, idle, 0.0).prompts == 0, "the first question"


def test_hosts_that_stall_grow_until_all_experts_fit_and_keep_that_memory_while_there_is_work() -> None:
    stalling = HostsLoad(busy=(0.3, 0.3), stall_share=0.4, capacity=100, num_experts=400)
    assert wanted_hosts(2, stalling, RULES) == 3
    assert wanted_hosts(4, replace(stalling, busy=(0.15,) * 4), RULES) == 4, "all fit: more memory is of no use"
    at_ease = HostsLoad(busy=(0.1,) * 4, stall_share=0.0, capacity=100, num_experts=400)
    assert wanted_hosts(4, at_ease, RULES) == 4, "with fewer it would stall again"
    assert wanted_hosts(4, replace(at_ease, capacity=400), RULES) == 1
    assert wanted_hosts(4, replace(at_ease, busy=(0.001,) * 4), RULES) == 1, "nobody is there to stall"
    assert wanted_hosts(2, replace(at_ease, busy=(0.9, 0.9), capacity=400), RULES) == 3, "computing is load, too"


def _host(index: int, host_id: str, busy_s: float, stall_s: float = 0.0) -> HostReport:
    return HostReport(
        host_id=host_id,
        index=index,
        node_id="n",
        phase=StartupPhase.READY,
        capacity=50,
        busy_s=busy_s,
        stall_s=stall_s,
    )


def _worker(steps: int, stall_s: float) -> WorkerReport:
    return WorkerReport(
        worker_id="w",
        replica_id="r",
        node_id="n",
        phase=StartupPhase.READY,
        layers=(0, 1),
        num_experts=64,
        steps=steps,
        stall_s=stall_s,
    )


def test_the_load_of_hosts_is_what_changed_between_two_reports_of_the_same_incarnation() -> None:
    hosts = {0: (_host(0, "a", 10.0), _host(0, "a", 15.0)), 1: (_host(1, "b", 90.0), _host(1, "c", 1.0))}
    load = hosts_load(hosts, {"w": (_worker(5, 1.0), _worker(9, 3.0))}, 10.0)
    assert load == HostsLoad(busy=(0.5,), stall_share=0.2, capacity=50, num_experts=128)
    assert hosts_load({1: hosts[1]}, {}, 10.0) is None
    idle = hosts_load(hosts, {"w": (_worker(5, 1.0), _worker(5, 1.0))}, 10.0)
    assert idle is not None and idle.stall_share == 0


def test_what_a_host_waits_for_its_disk_counts_as_what_steps_wait() -> None:
    hosts = {0: (_host(0, "a", 1.0), _host(0, "a", 8.0, 6.0)), 1: (_host(1, "b", 1.0, 1.0), _host(1, "b", 2.0, 2.0))}
    load = hosts_load(hosts, {"w": (_worker(5, 1.0), _worker(9, 3.0))}, 10.0)
    assert load is not None and load.stall_share == 0.6
    assert wanted_hosts(2, load, RULES) == 3


def test_impossible_rules_are_refused() -> None:
    with pytest.raises(ConfigError, match="from 3 up to 2"):
        ScalingRules(least=3, most=2)
    with pytest.raises(ConfigError, match="low must be below high"):
        ScalingRules(least=1, most=2, high=0.5, low=0.5)
