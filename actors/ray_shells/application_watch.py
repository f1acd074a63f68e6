"""Ends an application's detached actors when Serve has it no more, however it went: nobody else would.

Runs in the scheduler's process, in a thread of its own; knows which of Serve's applications is ours, since the workers
say so with every report.
"""

from __future__ import annotations

import contextlib
import logging
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import ray
from ray.exceptions import RayError

from actors.ray_shells.named_actors import ActorKind, DetachedActors, end_application, named_actors
from actors.ray_shells.serve_state import served_applications
from cluster.application import ApplicationId
from cluster.control.presence import Ownership, Presence, ServedApplication, is_served
from cluster.errors import ConfigError, Unavailable
from cluster.logs import log_event
from cluster.periodic import Pace, PeriodicLoop

_LOG = logging.getLogger(__name__)
_LOOK_EVERY_S = 2.0
_CALL_TIMEOUT_S = 2.0


class ApplicationWatch:
    """One application's. Safe for any number of threads."""

    def __init__(self, application: ApplicationId, digest: str, on_gone: Callable[[], None]) -> None:
        """Args: digest: of what was deployed. on_gone: called once before all is ended, to start nothing more."""
        self._application = application
        self._on_gone = on_gone
        self._lock = threading.Lock()
        self._ownership = Ownership(application.name, digest)
        self._presence = Presence(time.monotonic())
        self._is_gone = False
        self._loop = PeriodicLoop(self._look_or_end, Pace("watch", interval_s=_LOOK_EVERY_S))

    @property
    def owner(self) -> str | None:
        """Which of Serve's applications this is; None until one of its workers has said so."""
        return self._ownership.owner

    def start(self) -> None:
        """Watch from now on."""
        self._loop.start()

    def claim(self, by: str, digest: str) -> None:
        """A worker of Serve's application `by` says that it is one of ours.

        Raises:
            ConfigError: another application is; says what to set.
        """
        if by == self.owner:  # every report of every worker comes here
            return
        served = _look()
        with self._lock:
            refusal = self._ownership.claim(by, digest, served)
        if refusal is not None:
            raise ConfigError(refusal)
        log_event(_LOG, logging.INFO, "the application is known to Serve", application=by)

    def adopt(self, by: str | None, digest: str) -> bool:
        """A deployment of this application is being built: as Serve's application `by`, None: the builder isn't told.

        Returns:
            Whether this process goes on; False: it is ending everything, and itself.
        Raises:
            ConfigError: the application is another deployment's; says what to set.
        """
        served = _look()
        with self._lock:
            refusal = self._ownership.adopt(by, digest, served)
            if refusal is None:
                self._presence.expect(time.monotonic())
            is_gone = self._is_gone
        if refusal is not None:
            raise ConfigError(refusal)
        return not is_gone

    def _look_or_end(self) -> None:
        """See whether the application is there; once it is gone, end its actors until none is left, this one last."""
        if not self._is_gone:
            if not self._note():
                return
            log_event(_LOG, logging.INFO, "the application is gone; its actors end", application=self.owner or "")
            self._on_gone()
        with contextlib.suppress(RayError):
            end_application(self._application, keep=ActorKind.SCHEDULER)
            ray.kill(ray.get_runtime_context().current_actor)

    def _note(self) -> bool:
        served, owner = _look(), self.owner
        try:
            is_there = None if served is None else is_served(owner, served, () if owner else self._other_owners())
        except RayError:
            is_there = None
        with self._lock:
            self._is_gone = self._presence.note(is_there, time.monotonic())
            return self._is_gone

    def _other_owners(self) -> list[str]:
        """Serve's names of the other applications on this Ray, as their schedulers know them."""
        others = {application for application, name in named_actors() if name.kind == ActorKind.SCHEDULER}
        calls: list[ray.ObjectRef] = []
        for application in others - {self._application}:
            with contextlib.suppress(ValueError):
                actor: Any = DetachedActors(application, ActorKind.SCHEDULER).find()
                calls.append(actor.owner.remote())
        ready = ray.wait(calls, num_returns=len(calls), timeout=_CALL_TIMEOUT_S)[0] if calls else []
        owners: list[str | None] = [ray.get(call) for call in ready]
        return [owner for owner in owners if owner is not None]


def _look() -> Mapping[str, ServedApplication] | None:
    try:
        return served_applications()
    except Unavailable:
        return None
