"""The interface of an eviction policy. Knows experts and their order of use; knows no memory."""

from __future__ import annotations

from collections.abc import Container
from typing import Protocol

from cluster.types import ExpertId


class EvictionPolicy(Protocol):
    """Told of every use, insertion and eviction, it names the next victim."""

    def on_use(self, expert: ExpertId) -> None:
        """A resident expert is used."""
        ...

    def on_insert(self, expert: ExpertId) -> None:
        """An expert became resident."""
        ...

    def on_evict(self, expert: ExpertId) -> None:
        """An expert left."""
        ...

    def choose_victim(self, pinned: Container[ExpertId]) -> ExpertId | None:
        """The resident expert to evict next, never one in `pinned`; None if there is none."""
        ...
