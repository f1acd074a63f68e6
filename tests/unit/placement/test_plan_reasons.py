"""What a plan does for each reason there is: a lost or draining host, a hot expert, phases, speeds, room."""

from __future__ import annotations

from dataclasses import replace

import pytest
from placement_inputs import busiest, inputs_of, owners_of, placed

from cluster.placement import (
    plan_placement,
)
from cluster.placement.plan import MoveKind, PlacementPlan
from cluster.types import ExpertId, Phase, Tier


def test_an_expert_of_a_lost_host_gets_an_owner_whatever_it_costs() -> None:
    current = placed({0: (0, 1)}, {0: (2, 3)}, {0: (4, 5)})
    inputs = inputs_of({Phase.DECODE: [[1.0] * 6]}, current, num_hosts=2)

    plan = plan_placement(replace(inputs, max_bytes=0, bytes_per_s=1.0))

    assert plan.applies
    assert {(move.kind, move.expert.expert, move.source) for move in plan.moves} == {
        (MoveKind.ADD, 4, None),
        (MoveKind.ADD, 5, None),
    }
    assert all("host 2 is lost" in move.reason for move in plan.moves)
    assert {owners_of(plan.placement, 0, expert) == set() for expert in range(6)} == {False}
    assert 2 not in plan.placement.hosts and plan.placement.epoch == 4


def test_a_draining_host_gives_all_it_has() -> None:
    current = placed({0: (0, 1)}, {0: (1, 2)}, {0: (2, 3)})
    inputs = inputs_of({Phase.DECODE: [[1.0] * 4]}, current)
    draining = replace(inputs, hosts=(*inputs.hosts[:2], replace(inputs.hosts[2], is_draining=True)))

    plan = plan_placement(replace(draining, max_bytes=1000))

    assert sorted(plan.placement.hosts) == [0, 1]
    assert [(m.kind, m.expert.expert, m.source) for m in plan.moves if m.num_bytes] == [(MoveKind.MOVE, 3, 2)]
    assert "drains" in plan.moves[0].reason


def test_a_hot_expert_gets_a_replica_only_where_there_is_room() -> None:
    """Expert 0 is as much work as all others: no arrangement without a replica is level."""
    current = placed({0: (0, 1)}, {0: (2, 3)})
    roomy = inputs_of({Phase.DECODE: [[6.0, 1.0, 1.0, 2.0]]}, current, capacity=3)

    plan = plan_placement(roomy)
    full = plan_placement(inputs_of({Phase.DECODE: [[6.0, 1.0, 1.0, 2.0]]}, current, capacity=2))

    assert owners_of(plan.placement, 0, 0) == {0, 1}
    assert plan.balance_then == pytest.approx(1.0)
    assert any(move.kind is MoveKind.ADD and "a further replica" in move.reason for move in plan.moves)
    assert all(len(owners_of(full.placement, 0, expert)) == 1 for expert in range(4))


def test_bytes_bound_what_moves_and_the_best_goes_first() -> None:
    current = placed({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}, {0: (), 1: ()})
    inputs = inputs_of({Phase.DECODE: [[8.0, 8.0, 8.0, 8.0], [8.0, 8.0, 1.0, 1.0]]}, current)

    plan = plan_placement(replace(inputs, max_bytes=2000))
    more = plan_placement(replace(inputs, current=plan.placement, max_bytes=2000))

    assert plan.num_bytes == more.num_bytes == 2000
    assert plan.gain_s > more.gain_s > 0
    assert busiest(inputs, more.placement) < busiest(inputs, plan.placement) < busiest(inputs, current)


def test_phases_are_weighed_apart() -> None:
    """Each phase alone has its two hot experts on one host; their sum is level, so one number would see nothing."""
    current = placed({0: (0, 1)}, {0: (2, 3)})
    loads = {Phase.PREFILL: [[9.0, 9.0, 1.0, 1.0]], Phase.DECODE: [[1.0, 1.0, 9.0, 9.0]]}

    plan = plan_placement(inputs_of(loads, current, capacity=2))

    assert plan.applies and plan.balance_now == pytest.approx(1.8)
    assert plan.balance_then == pytest.approx(1.0)


def test_a_faster_host_gets_more_and_a_smaller_one_holds_less() -> None:
    current = placed({0: tuple(range(6))}, {0: tuple(range(6, 12))})
    inputs = inputs_of({Phase.DECODE: [[1.0] * 12]}, current, capacity=12)
    fast = replace(inputs, hosts=(inputs.hosts[0], replace(inputs.hosts[1], row_s=0.5e-3)))
    small = replace(fast, hosts=(fast.hosts[0], replace(fast.hosts[1], capacity=7)))

    plan, bounded = plan_placement(fast), plan_placement(small)

    assert plan.balance_then == pytest.approx(1.0)
    assert len(bounded.placement.hosts[1][0]) == 7


def test_memory_bound_decode_levels_distinct_experts_not_rows() -> None:
    """A batch of 50 rows touches every expert, however hot: six experts are more reading than two hot ones."""
    current = placed({0: (0, 1)}, {0: (2, 3, 4, 5, 6, 7)})
    inputs = inputs_of({Phase.DECODE: [[60.0, 60.0, 20.0, 20.0, 20.0, 20.0, 20.0, 20.0]]}, current)
    reading = tuple(replace(host, expert_s=1e-2, row_s=1e-6) for host in inputs.hosts)
    load = replace(inputs.loads[Phase.DECODE], rows_per_batch=50.0)

    plan = plan_placement(replace(inputs, hosts=reading, loads={Phase.DECODE: load}))
    by_rows = plan_placement(inputs)

    assert not by_rows.applies, "by rows the hosts are level"
    assert plan.applies and any("memory-bound" in move.reason for move in plan.moves)


def test_what_does_not_fit_moves_to_where_there_is_room() -> None:
    """Host 1 owns four experts and holds two: the two that are used least are read every time, unless they move."""
    current = placed({0: (0,)}, {0: (1, 2, 3, 4)})
    inputs = inputs_of({Phase.DECODE: [[4.0, 1.0, 2.0, 3.0, 1.5]]}, current)
    hosts = tuple(
        replace(host, capacity=capacity, miss_s={Tier.DISK: 0.05})
        for host, capacity in zip(inputs.hosts, (4, 2), strict=True)
    )

    plan = plan_placement(replace(inputs, hosts=hosts))

    assert len(plan.placement.hosts[1][0]) == 2 and len(plan.placement.hosts[0][0]) == 3


def test_second_replicas_against_a_loss_are_made_when_that_pays() -> None:
    current = placed({0: (0, 1)}, {0: (2, 3)})
    inputs = inputs_of({Phase.DECODE: [[4.0, 1.0, 1.0, 2.0]]}, current, capacity=3)
    hosts = tuple(replace(host, miss_s={Tier.DISK: 0.05}) for host in inputs.hosts)
    frail = replace(inputs, hosts=hosts, failure_interval_s=3600.0, bytes_per_s=1e6, balance_threshold=2.0)

    plan, sturdy = plan_placement(frail), plan_placement(replace(frail, failure_interval_s=1e9))

    assert not sturdy.applies
    assert {expert for expert in range(4) if len(owners_of(plan.placement, 0, expert)) == 2} == {0, 3}
    assert all("is lost" in move.reason for move in plan.moves)


def test_hosts_that_were_not_measured_are_left_alone() -> None:
    inputs = inputs_of({Phase.DECODE: [[9.0, 1.0, 1.0, 1.0]]}, placed({0: (0, 1)}, {0: (2, 3)}))

    plan = plan_placement(replace(inputs, hosts=tuple(replace(host, row_s=0.0) for host in inputs.hosts)))

    assert not plan.applies and "measured" in plan.reason


def test_hot_experts_are_promoted_and_colder_ones_make_room() -> None:
    inputs = inputs_of({Phase.DECODE: [[5.0, 1.0, 4.0, 0.5]]}, placed({0: (0, 1, 2, 3)}), capacity=2)
    tiers = {ExpertId(0, 0): Tier.DISK, ExpertId(0, 1): Tier.DEVICE, ExpertId(0, 2): Tier.DEVICE}
    host = replace(inputs.hosts[0], miss_s={Tier.DISK: 0.02, Tier.RAM: 0.001}, ram_capacity=1)

    plan = plan_placement(replace(inputs, hosts=(host,), tiers={0: tiers}))

    found = {(move.expert.expert, move.from_tier, move.to_tier) for move in plan.moves}
    assert found == {(0, Tier.DISK, Tier.DEVICE), (1, Tier.DEVICE, Tier.RAM)}


def test_no_host_left_is_a_reason_to_stay() -> None:
    inputs = inputs_of({Phase.DECODE: [[1.0, 2.0]]}, placed({0: (0, 1)}))

    plan: PlacementPlan = plan_placement(replace(inputs, hosts=()))

    assert not plan.applies and "no host" in plan.reason


@pytest.mark.parametrize("has_load", [True, False])
@pytest.mark.parametrize("owned", [(), (0,)])
def test_a_host_that_comes_back_gets_its_share_without_a_gain(has_load: bool, owned: tuple[int, ...]) -> None:
    """What an emptied node had is with the others; to bring it back costs more than it saves, and waits for nothing."""
    rest = tuple(expert for expert in range(8) if expert not in owned)
    current = placed({0: owned, 1: owned}, {0: rest[:4], 1: rest[:4]}, {0: rest[4:], 1: rest[4:]})
    load = 1.0 if has_load else 0.0
    inputs = replace(inputs_of({Phase.DECODE: [[load] * 8] * 2}, current, capacity=16), bytes_per_s=1e-3, max_bytes=0)
    back = replace(inputs, hosts=(replace(inputs.hosts[0], comes=True), *inputs.hosts[1:]))

    assert not plan_placement(inputs).applies
    plan = plan_placement(back)

    assert plan.applies
    counts = [sum(map(len, layers.values())) for layers in plan.placement.hosts.values()]
    assert sum(counts) == 16 and min(counts) >= 4, counts
    assert "come (back)" in plan.reason
    assert not plan_placement(replace(back, current=plan.placement)).applies, "and then it has it"


def test_a_newcomer_takes_its_share_of_the_load_not_of_the_numbers_alone() -> None:
    loads = {Phase.DECODE: [[16.0, 8.0, 4.0, 2.0, 1.0, 1.0, 1.0, 1.0]]}
    inputs = inputs_of(loads, placed({0: tuple(range(8))}, {0: ()}), capacity=8)
    comes = replace(inputs, hosts=(inputs.hosts[0], replace(inputs.hosts[1], comes=True)), bytes_per_s=1e-3)

    plan = plan_placement(comes)

    assert plan.balance_then < 1.2 < plan.balance_now
