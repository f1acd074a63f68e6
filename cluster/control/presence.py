"""Whether an application is still there, and who it is. Knows names and times; asks nobody.

An application's detached actors outlive it by themselves. They may end only when it is surely gone: Serve said so
several times in a row over some seconds. No answer (Serve's controller restarts, the network is cut) says nothing.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

WORKER_DEPLOYMENT = "AttentionWorker"

_IS_COMING = ("NOT_STARTED", "DEPLOYING")
_IS_GOING = "DELETING"
_MISSES = 5
_GONE_S = 10.0
_GRACE_S = 60.0  # in which a deployment that is being built comes to Serve


class ServedApplication(NamedTuple):
    """One of Serve's applications: its status in Serve's words, the names of its deployments, where it answers."""

    status: str
    deployments: frozenset[str]
    route_prefix: str = ""

    @property
    def is_coming(self) -> bool:
        """Whether Serve is deploying it, for the first time or again."""
        return self.status in _IS_COMING

    @property
    def is_going(self) -> bool:
        """Whether Serve is deleting it."""
        return self.status == _IS_GOING


def is_served(owner: str | None, served: Mapping[str, ServedApplication], others: Collection[str]) -> bool:
    """Whether Serve has the application.

    Args:
        owner: its name in Serve; None: none of its workers has said so yet. Then any may be it that is being deployed
            or has attention workers, but those of `others`.
    """
    if owner is not None:
        return owner in served and not served[owner].is_going
    return any(
        name not in others and not each.is_going and (each.is_coming or WORKER_DEPLOYMENT in each.deployments)
        for name, each in served.items()
    )


class Presence:
    """Counts how long an application has been gone."""

    def __init__(self, now_s: float) -> None:
        self._not_before_s = now_s + _GRACE_S
        self._misses = 0
        self._missed_s = now_s

    def expect(self, now_s: float) -> None:
        """It is being deployed: it may take a while to come."""
        self._misses, self._not_before_s = 0, now_s + _GRACE_S

    def note(self, is_there: bool | None, now_s: float) -> bool:
        """Args: is_there: as seen just now; None: nothing was to be learned. Returns whether it is gone for good."""
        if is_there is not False:
            self._misses = 0
            if is_there:
                self._not_before_s = now_s
            return False
        if not self._misses:
            self._missed_s = now_s
        self._misses += 1
        return self._misses >= _MISSES and now_s - self._missed_s >= _GONE_S and now_s >= self._not_before_s


class Ownership:
    """Which of Serve's applications an application is: the first whose workers say so, until it is gone."""

    def __init__(self, application: str, digest: str) -> None:
        """Args: application: for people. digest: of what was deployed."""
        self._application = application
        self._digest = digest
        self.owner: str | None = None

    def claim(self, by: str, digest: str, served: Mapping[str, ServedApplication] | None) -> str | None:
        """A worker of Serve's application `by`, deployed as `digest`, says that it is one of ours.

        Args: served: None: Serve does not answer; then whoever owned it still does.
        Returns:
            Why not; None if so.
        """
        if by == self.owner:
            return None
        if self._is_alive(served):
            return self._refusal(f"Serve's application {self.owner!r} has it already")
        if digest != self._digest:
            return self._refusal("it was deployed with another configuration or model at the same time")
        self.owner = by
        return None

    def adopt(self, by: str | None, digest: str, served: Mapping[str, ServedApplication] | None) -> str | None:
        """`digest` is being deployed in our place, as Serve's application `by` (None: the builder isn't told).

        Returns:
            Why not; None if it may.
        """
        if not self._is_alive(served):
            self.owner = None
            return None
        if by == self.owner:
            return None
        if by is None and digest == self._digest:
            return None  # the workers will say whose they are
        is_redeployed = served is not None and self.owner is not None and served[self.owner].is_coming
        if by is None and is_redeployed:
            return None
        return self._refusal(f"Serve's application {self.owner!r} has it, with another configuration or model")

    def _is_alive(self, served: Mapping[str, ServedApplication] | None) -> bool:
        return self.owner is not None and (served is None or is_served(self.owner, served, ()))

    def _refusal(self, fact: str) -> str:
        return (
            f"ray.application {self._application} is in use: {fact}; give this deployment a ray.application of its own"
            + (f", or delete {self.owner!r} first" if self.owner else "")
        )
