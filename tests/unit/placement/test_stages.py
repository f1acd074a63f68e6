"""The stages of a migration: each owns every expert and fits beside the one before."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings
from migrating_cluster import ALL, owned_by, placement_of

from cluster.placement.stages import experts_of, stages


@settings(max_examples=300, deadline=None)
@given(data=st.data(), hosts=st.integers(1, 4), spare=st.integers(0, 4))
def test_every_stage_owns_every_expert_and_fits_beside_the_one_before(
    data: st.DataObject, hosts: int, spare: int
) -> None:
    now, then = data.draw(owned_by(hosts)), data.draw(owned_by(hosts))
    capacities = {
        host: max(len(now[host]), len(then[host])) + data.draw(st.integers(0, spare)) for host in range(hosts)
    }
    current, target = placement_of(now), placement_of(then)

    steps = stages(current, target, capacities, live=range(hosts))

    before = current
    for step in steps:
        owned = {host: experts_of(step, host) for host in range(hosts)}
        assert set().union(*owned.values()) == set(ALL)
        for host in range(hosts):
            assert len(owned[host] | experts_of(before, host)) <= capacities[host]
        before = step
    arrived = {host: experts_of(before, host) for host in range(hosts)}
    has_room = any(capacities[host] > len(now[host]) for host in range(hosts))
    has_replicas = sum(map(len, now.values())) > len(ALL)
    if has_room or has_replicas:
        assert arrived == then, "a single free place anywhere is enough"
    assert steps == stages(current, target, capacities, live=range(hosts)), "the same again"


def test_full_hosts_trade_experts_by_way_of_the_one_free_place() -> None:
    now = {0: set(ALL[:4]), 1: set(ALL[4:]), 2: set()}
    target = placement_of({0: set(ALL[4:]), 1: set(ALL[:4]), 2: set()})

    steps = stages(placement_of(now), target, {0: 4, 1: 4, 2: 1}, live=(0, 1, 2))

    assert {host: experts_of(steps[-1], host) for host in range(3)} == {
        host: experts_of(target, host) for host in range(3)
    }
    assert stages(placement_of(now), target, {0: 4, 1: 4, 2: 0}, live=(0, 1, 2)) == (), "no place, no way"


def test_full_hosts_trade_experts_in_the_place_of_a_replica() -> None:
    one, two, three = ALL[:3]
    target = placement_of({0: {one, three}, 1: {one, two}})

    steps = stages(placement_of({0: {one, two}, 1: {one, three}}), target, {0: 2, 1: 2}, live=(0, 1))

    assert [experts_of(steps[-1], host) for host in (0, 1)] == [{one, three}, {one, two}]


def test_what_makes_room_elsewhere_comes_first() -> None:
    one, two, three = ALL[:3]
    target = placement_of({0: {one, two}, 1: {one, three}})

    steps = stages(placement_of({0: {one, three}, 1: {two}}), target, {0: 2, 1: 2}, live=(0, 1))

    assert [experts_of(steps[-1], host) for host in (0, 1)] == [{one, two}, {one, three}]
    assert experts_of(steps[0], 1) == {two, three}, "the only free place is not for the replica"


def test_experts_of_a_lost_host_get_owners_first() -> None:
    now = {0: set(ALL[:3]), 1: set(ALL[3:6]), 2: set(ALL[6:])}
    target = placement_of({0: set(ALL[:1] + ALL[3:]), 1: set(ALL[1:3] + ALL[3:6])})

    first, *_ = stages(placement_of(now), target, {0: 5, 1: 6}, live=(0, 1))

    assert experts_of(first, 0) >= set(ALL[6:]), "what nobody has any more"
