"""Migrations, whatever happens to hosts, workers and the scheduler: no expert is ever without a live owner."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cluster.placement.migration import (
    CommandKind,
    HostCommand,
    HostEpochs,
    Migration,
    MigrationPhase,
)
from cluster.placement.plan import Placement
from cluster.placement.stages import experts_of, stages
from cluster.types import ExpertId

LAYERS = (0, 3)
EXPERTS = 4
ALL = [ExpertId(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]


def _placement(owned: Mapping[int, set[ExpertId]], epoch: int = 1) -> Placement:
    hosts = {
        host: {layer: tuple(sorted(e.expert for e in experts if e.layer == layer)) for layer in LAYERS}
        for host, experts in owned.items()
    }
    return Placement(epoch=epoch, hosts=hosts)


@dataclass
class FakeHost:
    """A host that loads one expert a turn and keeps what ExpertHost keeps; `alive` False: it does not answer."""

    index: int
    owned: set[ExpertId]
    incarnation: int = 0
    published: int = 1
    taken: set[int] = field(default_factory=lambda: {1})
    before: set[ExpertId] = field(default_factory=set)
    command: HostCommand | None = None
    missing: set[ExpertId] = field(default_factory=set)
    problem: str | None = None
    alive: bool = True

    @property
    def held(self) -> set[ExpertId]:
        """In memory: what it owns, and what it needs for other epochs."""
        return self.owned | self.before | (self._coming - self.missing)

    @property
    def reserved(self) -> set[ExpertId]:
        return self.owned | self.before | self._coming

    @property
    def _coming(self) -> set[ExpertId]:
        if self.command is None:
            return set()
        return {ExpertId(layer, e) for layer, experts in self.command.owned.items() for e in experts}

    def say(self) -> HostEpochs | None:
        if not self.alive:
            return None
        return HostEpochs(
            host_id=f"{self.index}-{self.incarnation}",
            published=self.published,
            taken=tuple(sorted(self.taken)),
            preparing=self.command.epoch if self.command else 0,
            num_missing=len(self.missing),
            problem=self.problem,
        )

    def tell(self, command: HostCommand) -> None:
        if not self.alive:
            return
        if command.kind is CommandKind.PREPARE:
            is_same = self.command is not None and (self.command.epoch, self.command.owned) == (
                command.epoch,
                command.owned,
            )
            is_had = command.epoch in self.taken and (self.command is None or self.command.epoch != command.epoch)
            if not is_had and (not is_same or self.problem):
                self.command, self.problem = command, None
                self.missing = self._coming - self.owned - self.before
                self._finish()
        elif command.kind is CommandKind.PUBLISH and self.command and command.epoch == self.command.epoch:
            if not self.missing and self.problem is None:
                self.before, self.owned, self.published = self.owned, self._coming, command.epoch
                self.command = None
        elif command.kind is CommandKind.RETIRE and command.epoch == self.published:
            self.taken, self.before = {command.epoch}, set()
        elif command.kind is CommandKind.ABORT and self.command and command.epoch == self.command.epoch:
            self.taken.discard(command.epoch)
            self.command, self.missing, self.problem = None, set(), None

    def load(self) -> None:
        if self.alive and self.missing and self.problem is None:
            self.missing.discard(min(self.missing))
            self._finish()

    def restart(self, owned: set[ExpertId]) -> None:
        fresh = FakeHost(self.index, owned, incarnation=self.incarnation + 1)
        vars(self).update(vars(fresh))

    def _finish(self) -> None:
        if not self.missing and self.command is not None:
            self.taken.add(self.command.epoch)


class Cluster:
    """Hosts, two workers and a migration, one turn a second."""

    def __init__(self, owned: Mapping[int, set[ExpertId]], capacities: Mapping[int, int]) -> None:
        self.hosts = {index: FakeHost(index, set(experts)) for index, experts in owned.items()}
        self.capacities = capacities
        self.start_owned = {index: set(experts) for index, experts in owned.items()}
        self.remembered = _placement(owned)
        self.migration = self._scheduler()
        self.workers = {"a": 1, "b": 1}
        self.workers_follow = True
        self.now_s = 0.0

    def _scheduler(self) -> Migration:
        return Migration(self.remembered, bytes_per_s=1e6, worker_timeout_s=10.0)

    def start(self, target: Placement) -> bool:
        said = {index: host.say() for index, host in self.hosts.items()}
        return self.migration.start(target, self.capacities, hosts=said, expert_bytes=1, now_s=self.now_s)

    def turn(self, *, repeat: int = 1) -> tuple[HostCommand, ...]:
        self.now_s += 1.0
        said = {index: host.say() for index, host in self.hosts.items()}
        commands = self.migration.advance(self.now_s, said, self.workers)
        self.remembered = self.migration.published
        if self.workers_follow:
            self.workers = dict.fromkeys(self.workers, self.remembered.epoch)
        for _ in range(repeat):
            for command in commands:
                self.hosts[command.host].tell(command)
        for host in self.hosts.values():
            host.load()
        return commands

    def run(self, turns: int = 200) -> None:
        for _ in range(turns):
            followed = dict(self.workers)
            # A turn after which workers follow another epoch is not the last: hosts may now retire the one before.
            if not self.turn() and not self.migration.is_under_way and self.workers == followed:
                return
        pytest.fail(f"it does not settle: {self.migration.phase} {self.migration.reason}")

    def restart_scheduler(self) -> None:
        self.migration = self._scheduler()

    def check(self, *, live: bool = True) -> None:
        if live:
            held = set[ExpertId]().union(*(host.held for host in self.hosts.values() if host.alive))
            assert held >= set(ALL), "every expert is in some live host's memory"
        for index, host in self.hosts.items():
            assert len(host.reserved) <= self.capacities[index], "old and new together fit"
            if host.alive and index in self.remembered.hosts and host.published == self.remembered.epoch:
                assert host.owned == experts_of(self.remembered, index)


@st.composite
def _owned(draw: st.DrawFn, hosts: int) -> dict[int, set[ExpertId]]:
    owned: dict[int, set[ExpertId]] = {host: set() for host in range(hosts)}
    for expert in ALL:
        for host in draw(st.sets(st.integers(0, hosts - 1), min_size=1, max_size=hosts)):
            owned[host].add(expert)
    return owned


@settings(max_examples=300, deadline=None)
@given(data=st.data(), hosts=st.integers(1, 4), spare=st.integers(0, 4))
def test_every_stage_owns_every_expert_and_fits_beside_the_one_before(
    data: st.DataObject, hosts: int, spare: int
) -> None:
    now, then = data.draw(_owned(hosts)), data.draw(_owned(hosts))
    capacities = {
        host: max(len(now[host]), len(then[host])) + data.draw(st.integers(0, spare)) for host in range(hosts)
    }
    current, target = _placement(now), _placement(then)

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
    target = _placement({0: set(ALL[4:]), 1: set(ALL[:4]), 2: set()})

    steps = stages(_placement(now), target, {0: 4, 1: 4, 2: 1}, live=(0, 1, 2))

    assert {host: experts_of(steps[-1], host) for host in range(3)} == {
        host: experts_of(target, host) for host in range(3)
    }
    assert stages(_placement(now), target, {0: 4, 1: 4, 2: 0}, live=(0, 1, 2)) == (), "no place, no way"


def test_full_hosts_trade_experts_in_the_place_of_a_replica() -> None:
    one, two, three = ALL[:3]
    target = _placement({0: {one, three}, 1: {one, two}})

    steps = stages(_placement({0: {one, two}, 1: {one, three}}), target, {0: 2, 1: 2}, live=(0, 1))

    assert [experts_of(steps[-1], host) for host in (0, 1)] == [{one, three}, {one, two}]


def test_what_makes_room_elsewhere_comes_first() -> None:
    one, two, three = ALL[:3]
    target = _placement({0: {one, two}, 1: {one, three}})

    steps = stages(_placement({0: {one, three}, 1: {two}}), target, {0: 2, 1: 2}, live=(0, 1))

    assert [experts_of(steps[-1], host) for host in (0, 1)] == [{one, two}, {one, three}]
    assert experts_of(steps[0], 1) == {two, three}, "the only free place is not for the replica"


def test_experts_of_a_lost_host_get_owners_first() -> None:
    now = {0: set(ALL[:3]), 1: set(ALL[3:6]), 2: set(ALL[6:])}
    target = _placement({0: set(ALL[:1] + ALL[3:]), 1: set(ALL[1:3] + ALL[3:6])})

    first, *_ = stages(_placement(now), target, {0: 5, 1: 6}, live=(0, 1))

    assert experts_of(first, 0) >= set(ALL[6:]), "what nobody has any more"


EVENTS = ("turn", "repeat", "lose", "return", "restart", "scheduler", "abort", "workers", "start", "damage")


@settings(max_examples=120, deadline=None)
@given(data=st.data(), hosts=st.integers(2, 4), events=st.lists(st.tuples(st.sampled_from(EVENTS), st.integers(0, 3))))
def test_whatever_happens_every_prefix_is_sound_and_it_settles(
    data: st.DataObject, hosts: int, events: list[tuple[str, int]]
) -> None:
    now = data.draw(_owned(hosts))
    targets = [_placement(data.draw(_owned(hosts))) for _ in range(2)]
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
    return cluster, _placement({0: set(ALL[2:6]), 1: set(ALL[:2] + ALL[6:])})


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
