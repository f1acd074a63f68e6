"""Migrations, whatever happens to hosts, workers and the scheduler: no expert is ever without a live owner."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings
from migrating_cluster import ALL, Cluster, owned_by, placement_of

from cluster.placement.migration import (
    MigrationPhase,
)
from cluster.placement.plan import Placement
from cluster.placement.stages import experts_of

EVENTS = ("turn", "repeat", "lose", "return", "restart", "scheduler", "abort", "workers", "start", "damage")


@settings(max_examples=120, deadline=None)
@given(data=st.data(), hosts=st.integers(2, 4), events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3))))
def test_whatever_happens_every_prefix_is_sound_and_it_settles(
    data: st.DataObject, hosts: int, events: list[tuple[str, int]]
) -> None:
    now = data.draw(owned_by(hosts))
    targets = [placement_of(data.draw(owned_by(hosts))) for _ in range(2)]
    most = max(len(experts) for experts in now.values())
    capacities = dict.fromkeys(range(hosts), max(most, len(ALL)) + 2)
    cluster = Cluster(now, capacities)
    cluster.start(targets[0])
    is_whole = True  # nothing has been lost so far: then every expert must be in memory at all times
    for event, number in events:
        host = cluster.hosts[number % hosts]
        match event:
            case "lose":
                host.alive, is_whole = False, False
            case "return":
                host.alive = True
            case "restart":
                host.restart(cluster.start_owned[host.index])
                is_whole = False
            case "scheduler":
                cluster.restart_scheduler()
            case "abort":
                cluster.migration.abort("asked to")
            case "workers":
                cluster.workers_follow = not cluster.workers_follow
            case "start":
                cluster.start(targets[number % 2])
            case "damage":
                if host.command is not None and host.missing:
                    host.problem = "checksum"
            case _:
                cluster.turn(repeat=2 if event == "repeat" else 1)
        cluster.check(live=is_whole)
    for host in cluster.hosts.values():
        host.alive = True
    cluster.workers_follow = True
    cluster.run()
    cluster.check()
    for index, host in cluster.hosts.items():
        said = host.say()
        assert said is not None
        assert said.preparing == 0, "nothing prepared is left behind"
        assert said.published == cluster.remembered.epoch or index not in cluster.remembered.hosts
        assert said.taken == (said.published,)


def _two_hosts() -> tuple[Cluster, Placement]:
    cluster = Cluster({0: set(ALL[:4]), 1: set(ALL[4:])}, {0: 6, 1: 6})
    return cluster, placement_of({0: set(ALL[2:6]), 1: set(ALL[:2] + ALL[6:])})


def test_migration_is_published_when_all_have_prepared_and_retired_when_all_workers_follow() -> None:
    cluster, target = _two_hosts()
    cluster.workers_follow = False
    assert cluster.start(target)
    assert not cluster.start(target), "one at a time"
    seen: list[tuple[MigrationPhase, set[int]]] = []
    while cluster.migration.is_under_way and len(seen) < 8:
        cluster.turn()
        seen.append((cluster.migration.phase, set(cluster.hosts[0].taken)))
    assert cluster.remembered.epoch == 2
    assert seen[-1] == (MigrationPhase.SWITCHING, {1, 2}), "a worker is still at the old one"

    cluster.workers = {"a": 2, "b": 1}
    cluster.turn()
    assert cluster.hosts[0].taken == {1, 2}
    cluster.workers["b"] = 2
    cluster.run()

    assert cluster.migration.phase is MigrationPhase.DONE
    assert [host.taken for host in cluster.hosts.values()] == [{2}, {2}]
    assert not cluster.start(target), "it is there"


def test_worker_that_does_not_follow_is_waited_for_a_while_only() -> None:
    cluster, target = _two_hosts()
    cluster.workers_follow = False
    cluster.start(target)
    cluster.run(40)
    assert cluster.migration.phase is MigrationPhase.DONE


@pytest.mark.parametrize("fault", ["lost", "damaged"])
def test_fault_while_preparing_ends_the_migration_and_nothing_has_changed(fault: str) -> None:
    cluster, target = _two_hosts()
    cluster.start(target)
    cluster.turn()
    if fault == "lost":
        cluster.hosts[1].alive = False
    else:
        cluster.hosts[1].problem = "expert 3 of layer 0 has checksum 1 here and 2 there"
    cluster.run(20)

    assert cluster.migration.phase is MigrationPhase.ABORTED
    assert ("host 1 was lost" if fault == "lost" else "checksum 1") in cluster.migration.reason
    assert cluster.remembered.epoch == 1
    assert cluster.hosts[0].held == set(ALL[:4]), "what was prepared is let go"
    cluster.hosts[1].alive = True
    cluster.run()
    assert cluster.start(target), "and it can be tried again"
    cluster.run()
    assert cluster.remembered.epoch > 2, "numbers are not used twice"


def test_host_that_starts_anew_gets_the_published_placement() -> None:
    cluster, target = _two_hosts()
    cluster.start(target)
    cluster.run()

    cluster.hosts[1].restart(set(ALL[4:]))
    cluster.run()

    assert cluster.hosts[1].published == cluster.remembered.epoch
    assert cluster.hosts[1].owned == experts_of(target, 1)


def test_scheduler_that_forgot_what_it_published_publishes_anew() -> None:
    cluster, target = _two_hosts()
    old = cluster.remembered
    cluster.start(target)
    cluster.run()

    cluster.remembered = old
    cluster.restart_scheduler()
    cluster.run()

    assert cluster.remembered.epoch == 3
    assert [host.published for host in cluster.hosts.values()] == [3, 3]
    assert cluster.hosts[0].owned == set(ALL[:4])
