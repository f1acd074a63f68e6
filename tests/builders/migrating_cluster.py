"""Hosts, workers and a scheduler that migrate in turns, and fail when they are told to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import hypothesis.strategies as st
import pytest

from cluster.placement.migration import (
    CommandKind,
    HostCommand,
    HostEpochs,
    Migration,
)
from cluster.placement.plan import Placement
from cluster.placement.stages import experts_of
from cluster.types import ExpertId

LAYERS = (0, 3)
EXPERTS = 4
ALL = [ExpertId(layer, expert) for layer in LAYERS for expert in range(EXPERTS)]


def placement_of(owned: Mapping[int, set[ExpertId]], epoch: int = 1) -> Placement:
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
        self.remembered = placement_of(owned)
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
def owned_by(draw: st.DrawFn, hosts: int) -> dict[int, set[ExpertId]]:
    owned: dict[int, set[ExpertId]] = {host: set() for host in range(hosts)}
    for expert in ALL:
        for host in draw(st.sets(st.integers(0, hosts - 1), min_size=1, max_size=hosts)):
            owned[host].add(expert)
    return owned
