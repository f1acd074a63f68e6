"""Experts move between hosts while serving: which host is told what, and when. Pure: observations in, commands out.

An epoch has two phases. Hosts *prepare* it: they load what it adds beside what they have, verify it, and take frames of
both epochs from then on. When all have, it is *published*: the one step that is not undone; workers follow it from the
next layer on. When every worker does, or had its time, hosts *retire* the epoch before: they refuse its frames, and
what only it needed may leave. Until it is published a migration can be given up; hosts then let go of it.

Nothing is remembered but the published placement and the one being prepared: commands follow from what hosts say now.
They are repeated until they show, and a repeated one does nothing. So a lost answer, a host that starts anew, a
newcomer and a scheduler that starts anew are all the same case: a host that is not yet where it should be.

Where memory is tight one epoch is not enough: the way is split into stages (cluster/placement/stages.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from itertools import pairwise

from cluster.placement.plan import Placement
from cluster.placement.stages import experts_of, stages
from cluster.types import ExpertId

_LOST_AFTER_S = 5.0  # a host that says nothing for so long is not waited for
_PATIENCE_S, _PATIENCE = 60.0, 4.0  # to prepare: some, and so many times what the bytes take at the rate they may


class CommandKind(StrEnum):
    """What a host is told."""

    PREPARE = "prepare"
    PUBLISH = "publish"
    RETIRE = "retire"
    ABORT = "abort"


@dataclass(frozen=True, slots=True, kw_only=True)
class HostCommand:
    """One call of one host; harmless when repeated.

    PREPARE: load `owned` for `epoch`, no faster than bytes_per_s; `sources` names hosts that have what is new to it.
    PUBLISH: `epoch` is the current one. RETIRE: take frames of `epoch` only. ABORT: forget what was prepared for it.
    """

    kind: CommandKind
    host: int
    epoch: int
    owned: Mapping[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    sources: Mapping[ExpertId, int] = field(default_factory=dict[ExpertId, int])
    bytes_per_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEpochs:
    """What a host says of its epochs.

    host_id: of its incarnation. published: that of its welcome. taken: those whose frames it takes, ascending.
    preparing: which one it was told to prepare last, 0: none. num_missing: experts of it that are still to come; 0 and
    no problem: it is prepared. moved_bytes: loaded for it so far. problem: why it cannot be prepared.
    """

    host_id: str
    published: int
    taken: tuple[int, ...]
    preparing: int = 0
    num_missing: int = 0
    moved_bytes: int = 0
    problem: str | None = None

    @property
    def prepared(self) -> int:
        """The epoch that is ready to be published; 0: none."""
        return self.preparing if self.num_missing == 0 and self.problem is None else 0


class MigrationPhase(StrEnum):
    """How far the last migration is."""

    IDLE = "idle"
    PREPARING = "preparing"
    SWITCHING = "switching"
    DONE = "done"
    ABORTED = "aborted"


class Migration:
    """The way of all hosts to one placement after the other."""

    def __init__(self, published: Placement, *, bytes_per_s: float, worker_timeout_s: float) -> None:
        """Args: bytes_per_s: what all hosts together may load. worker_timeout_s: a worker that has not switched by
        then learns of the new epoch by a refusal."""
        self.published = published
        self.phase = MigrationPhase.IDLE
        self.reason = ""
        self.planned_bytes = 0
        self._bytes_per_s = bytes_per_s
        self._worker_timeout_s, self._prepare_timeout_s = worker_timeout_s, 0.0
        self._stages: list[Placement] = []
        self._began_s = self._published_s = 0.0
        self._highest = published.epoch  # numbers are not used twice, not even those of epochs that were given up
        self._told: dict[int, str] = {}  # of the stage being prepared: host -> incarnation that was told
        self._heard_s: dict[int, float] = {}

    @property
    def is_under_way(self) -> bool:
        """Whether a migration has begun and not ended."""
        return self.phase in (MigrationPhase.PREPARING, MigrationPhase.SWITCHING)

    @property
    def num_stages_left(self) -> int:
        """Epochs that are not published yet."""
        return len(self._stages)

    @property
    def hosts(self) -> tuple[int, ...]:
        """Hosts that have to be heard."""
        indices = set(self.published.hosts)
        for stage in self._stages:
            indices |= set(stage.hosts)
        return tuple(sorted(indices))

    def start(
        self,
        target: Placement,
        capacities: Mapping[int, int],
        *,
        hosts: Mapping[int, HostEpochs | None],
        expert_bytes: int,
        now_s: float,
    ) -> bool:
        """Begin to go to `target`, whose epoch does not matter; False if that cannot or need not be.

        Args: capacities: experts a host holds; one not named holds what it is given. hosts: what each says now.
        """
        if self.is_under_way:
            return False
        self._hear(now_s, hosts)
        live = [index for index, said in hosts.items() if said is not None]
        steps = stages(self.published, target, capacities, live=live)
        if not steps:
            return False
        self._stages = [Placement(epoch=self._highest + 1 + i, hosts=step.hosts) for i, step in enumerate(steps)]
        self._highest += len(steps)
        self.planned_bytes = expert_bytes * _num_gained((self.published, *self._stages))
        self._prepare_timeout_s = _PATIENCE_S + _PATIENCE * self.planned_bytes / self._bytes_per_s
        self.reason = ""
        self._prepare_next(now_s)
        return True

    def abort(self, reason: str) -> None:
        """Give up what is not published; what is stays."""
        if self._stages:
            self._stages = []
            self.phase, self.reason = MigrationPhase.ABORTED, reason

    def advance(
        self, now_s: float, hosts: Mapping[int, HostEpochs | None], workers: Mapping[str, int]
    ) -> tuple[HostCommand, ...]:
        """What to tell hosts now.

        Args: hosts: what each says; None or missing: it does not answer. workers: the epoch each one's steps follow.
        `published` is another placement afterwards if all have prepared it: it is to be made known at once.
        """
        self._hear(now_s, hosts)
        self._highest = max((self._highest, *workers.values()))
        if not self.is_under_way and self._is_behind(hosts):
            self._stages = [Placement(epoch=self._highest + 1, hosts=self.published.hosts)]
            self._highest += 1
            self.planned_bytes, self._prepare_timeout_s = 0, _PATIENCE_S
            self._prepare_next(now_s)
        if self.phase is MigrationPhase.PREPARING:
            commands = self._prepare(now_s, hosts)
            if self.phase is MigrationPhase.PREPARING:
                return commands
        commands = self._settle(now_s, hosts, workers)
        if self.phase is MigrationPhase.SWITCHING and not commands and self._all_switched(now_s, workers):
            if self._stages:
                self._prepare_next(now_s)
            else:
                self.phase = MigrationPhase.DONE
        return commands

    def _hear(self, now_s: float, hosts: Mapping[int, HostEpochs | None]) -> None:
        for index, said in hosts.items():
            if said is not None:
                self._heard_s[index] = now_s
                self._highest = max(self._highest, said.published, said.preparing, *said.taken)

    def _prepare_next(self, now_s: float) -> None:
        self.phase, self._began_s, self._told = MigrationPhase.PREPARING, now_s, {}

    def _prepare(self, now_s: float, hosts: Mapping[int, HostEpochs | None]) -> tuple[HostCommand, ...]:
        stage = self._stages[0]
        commands: list[HostCommand] = []
        adding = [i for i in self.hosts if experts_of(stage, i) - experts_of(self.published, i)]
        for index in sorted(set(stage.hosts) | set(self.published.hosts)):
            said = hosts.get(index)
            if said is None:
                if index in stage.hosts and self._is_lost(index, now_s):
                    self.abort(f"expert host {index} was lost while it prepared epoch {stage.epoch}")
                    return ()
                if index in stage.hosts:
                    commands.append(self._preparation(index, stage, self._bytes_per_s, hosts))
                continue
            is_told = self._told.get(index) == said.host_id and said.preparing == stage.epoch
            if is_told and said.problem is not None:
                self.abort(f"expert host {index} cannot prepare epoch {stage.epoch}: {said.problem}")
                return ()
            if not is_told or said.prepared != stage.epoch:
                self._told[index] = said.host_id
                commands.append(self._preparation(index, stage, self._bytes_per_s / max(1, len(adding)), hosts))
        if not commands:
            self.published = self._stages.pop(0)
            self.phase, self._published_s = MigrationPhase.SWITCHING, now_s
        elif now_s - self._began_s > self._prepare_timeout_s:
            self.abort(f"epoch {stage.epoch} was not prepared within {self._prepare_timeout_s:.0f} s")
        return tuple(commands)

    def _preparation(
        self, index: int, placement: Placement, bytes_per_s: float, hosts: Mapping[int, HostEpochs | None]
    ) -> HostCommand:
        owner = {
            expert: other
            for other in sorted(self.published.hosts, reverse=True)
            if other != index and hosts.get(other) is not None
            for expert in experts_of(self.published, other)
        }
        new = experts_of(placement, index)
        if placement is not self.published:
            new = new - experts_of(self.published, index)
        return HostCommand(
            kind=CommandKind.PREPARE,
            host=index,
            epoch=placement.epoch,
            owned=placement.hosts.get(index, {}),
            sources={expert: owner[expert] for expert in sorted(new) if expert in owner},
            bytes_per_s=bytes_per_s,
        )

    def _settle(
        self, now_s: float, hosts: Mapping[int, HostEpochs | None], workers: Mapping[str, int]
    ) -> tuple[HostCommand, ...]:
        """What brings each host that answers to the published epoch and no other."""
        epoch, commands = self.published.epoch, list[HostCommand]()
        for index, said in sorted(hosts.items()):
            if said is None:
                continue
            kind: CommandKind | None = None
            if said.preparing and said.preparing != epoch:
                kind = CommandKind.ABORT
            elif epoch not in said.taken:
                if index in self.published.hosts:
                    commands.append(self._preparation(index, self.published, self._bytes_per_s, hosts))
            elif said.published != epoch:
                kind = CommandKind.PUBLISH
            elif said.taken != (epoch,) and self._all_switched(now_s, workers):
                kind = CommandKind.RETIRE
            if kind is not None:
                at = said.preparing if kind is CommandKind.ABORT else epoch
                commands.append(HostCommand(kind=kind, host=index, epoch=at))
        return tuple(commands)

    def _is_behind(self, hosts: Mapping[int, HostEpochs | None]) -> bool:
        """Whether hosts have published what this scheduler does not remember: it may have died before it could."""
        return any(said is not None and said.published > self.published.epoch for said in hosts.values())

    def _all_switched(self, now_s: float, workers: Mapping[str, int]) -> bool:
        is_over = now_s - self._published_s >= self._worker_timeout_s
        return is_over or all(epoch >= self.published.epoch for epoch in workers.values())

    def _is_lost(self, index: int, now_s: float) -> bool:
        return now_s - self._heard_s.setdefault(index, now_s) > _LOST_AFTER_S


def _num_gained(placements: Sequence[Placement]) -> int:
    """Experts that hosts load on the way."""
    return sum(
        len(experts_of(after, host) - experts_of(before, host))
        for before, after in pairwise(placements)
        for host in after.hosts
    )
