"""Named detached actors of an application: finding, starting, replacing and ending them, for every kind there is.

An actor's name says whose it is, what it is and what it was made of: `application/kind/key@digest`. So whether one that
is there serves what is deployed needs no answer from it: it may be starting, or restarting on another node.
"""

from __future__ import annotations

import contextlib
import logging
import re
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from cluster.application import ApplicationId
from cluster.logs import log_event

_LOG = logging.getLogger(__name__)
_NAME = re.compile(r"([^/@]+)/([^/@]+)/([^/@]*)@([^/@]+)")
_STOP_TIMEOUT_S = 5.0
_END_TIMEOUT_S = 30.0  # those that start each other again may take more than one turn
_LOOK_EVERY_S = 0.2


class ActorKind(StrEnum):
    """The kinds that there are."""

    SCHEDULER = "scheduler"
    GATEWAY = "grpc"
    HOST = "expert-host"
    SHELF = "expert-shelf"
    VALKEY = "valkey"


_STARTERS = (ActorKind.SCHEDULER,)  # starts hosts while it lives; a gateway is asked to stop, then starts no other


@dataclass(frozen=True, slots=True)
class ActorName:
    """The parts of a name."""

    application: str
    kind: str
    key: str
    digest: str

    def __str__(self) -> str:
        return f"{self.application}/{self.kind}/{self.key}@{self.digest}"

    @classmethod
    def parse(cls, text: str) -> ActorName | None:
        """None of an actor that is none of ours."""
        parts = _NAME.fullmatch(text)
        return cls(*parts.groups()) if parts is not None and parts[2] in set(ActorKind) else None


@dataclass(frozen=True, slots=True)
class DetachedActors:
    """Those of one kind and application. `key` tells them apart: a number, a node, nothing where there is only one."""

    application: ApplicationId
    kind: ActorKind

    def start(self, actor_class: type, key: str, digest: str, *args: object, **options: object) -> ActorHandle:
        """The actor that serves `digest`, started if there is none; one that serves something else is ended first.

        Returns at once: it may still be starting.
        """
        for name in self._names(key):
            if name.digest != digest:
                log_event(_LOG, logging.INFO, "an actor of another deployment is replaced", actor=str(name))
                _kill(self.application, name)
        remote_class: Any = ray.remote(actor_class)
        return remote_class.options(
            name=str(ActorName(self.application.name, self.kind, key, digest)),
            namespace=self.application.namespace,
            lifetime="detached",
            get_if_exists=True,
            num_cpus=0,
            max_restarts=-1,
            **options,
        ).remote(*args)

    def keep_only(self, digest_by_key: Mapping[str, str]) -> None:
        """End every other one."""
        for name in self._names():
            if digest_by_key.get(name.key) != name.digest:
                _kill(self.application, name)

    def list_keys(self) -> tuple[str, ...]:
        """Of those that there are, also those that are starting or being restarted."""
        return tuple(dict.fromkeys(name.key for name in self._names()))

    def find(self, key: str = "") -> ActorHandle:
        """The actor `key`.

        Raises:
            ValueError: there is none.
        """
        for name in self._names(key):
            return ray.get_actor(str(name), namespace=self.application.namespace)
        raise ValueError(f"no actor {self.kind}/{key} of application {self.application}")

    def find_all(self) -> Iterator[tuple[str, ActorHandle]]:
        """Key and handle of each."""
        for name in self._names():
            with contextlib.suppress(ValueError):  # ended meanwhile
                yield name.key, ray.get_actor(str(name), namespace=self.application.namespace)

    def end(self, key: str | None = None) -> None:
        """End the actor `key`, or all: each is asked to `stop`, then made to. Returns when none is left.

        Raises:
            RayError: Ray does not answer.
        """
        _end(lambda: [(self.application, name) for name in self._names(key)])

    def _names(self, key: str | None = None) -> Iterator[ActorName]:
        for application, name in named_actors():
            if application == self.application and name.kind == self.kind and key in (None, name.key):
                yield name


def named_actors() -> Iterator[tuple[ApplicationId, ActorName]]:
    """Every detached actor of every application on this Ray."""
    entries: Any = ray.util.list_named_actors(all_namespaces=True)
    for entry in entries:
        name = ActorName.parse(entry["name"])
        if name is not None:
            yield ApplicationId(entry["namespace"], name.application), name


def has_scheduler(application: ApplicationId) -> bool:
    """Whether an application has what looks after all its other actors."""
    return bool(DetachedActors(application, ActorKind.SCHEDULER).list_keys())


def end_application(application: ApplicationId, *, keep: ActorKind | None = None) -> None:
    """End all detached actors of an application but those of kind `keep`. Returns when none is left.

    Raises:
        RayError: Ray does not answer.
    """
    _end(lambda: [(owner, name) for owner, name in named_actors() if owner == application and name.kind != keep])


def _end(find: Callable[[], Sequence[tuple[ApplicationId, ActorName]]]) -> None:
    deadline_s = time.monotonic() + _END_TIMEOUT_S
    while found := find():
        for application, name in found:
            if name.kind in _STARTERS:
                _kill(application, name)
        calls: list[ray.ObjectRef] = []
        for application, name in found:
            with contextlib.suppress(ValueError):  # killed just now, or ended meanwhile
                actor: Any = ray.get_actor(str(name), namespace=application.namespace)
                calls.append(actor.stop.remote())
        if calls:  # one that is starting does not answer; it has nothing to put in order
            ray.wait(calls, num_returns=len(calls), timeout=_STOP_TIMEOUT_S)
        for application, name in found:
            _kill(application, name)
        if time.monotonic() > deadline_s:
            actors = [str(name) for _, name in found]
            log_event(_LOG, logging.WARNING, "actors that should have ended are still there", actors=actors)
            return
        time.sleep(_LOOK_EVERY_S)


def _kill(application: ApplicationId, name: ActorName) -> None:
    with contextlib.suppress(ValueError, RayError):
        ray.kill(ray.get_actor(str(name), namespace=application.namespace))
