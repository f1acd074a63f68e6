"""Whose a thing is: the name of an application and where it lives in Ray. Knows names only."""

from __future__ import annotations

from typing import NamedTuple


class ApplicationId(NamedTuple):
    """One system of front ends, workers, hosts and scheduler. Nothing of another one has its names or keys."""

    namespace: str
    name: str

    @property
    def key_prefix(self) -> str:
        """How its keys begin in a store that several applications share."""
        return f"{self.namespace}:{self.name}"

    def __str__(self) -> str:
        return f"{self.name!r} of namespace {self.namespace!r}"


DEFAULT_APPLICATION = ApplicationId("moesaic", "moesaic")
