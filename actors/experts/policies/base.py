"""The interface of an eviction policy. Knows experts and their order of use; knows no memory.

Most policies are a `Scorer` - a value for every expert - inside one `LowestScorePolicy`. What a policy or its scorer
knows of gates it hears as a `SignalListener`; a policy that needs no signals (lru) costs none.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from actors.experts.predict.base import Predictor
from actors.experts.signals import SignalListener
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

    def choose_victim(self, pinned: Collection[ExpertId]) -> ExpertId | None:
        """The resident expert to evict next, never one in `pinned`; None if there is none."""
        ...


class Scorer(Protocol):
    """Values experts."""

    def on_use(self, index: int) -> None:
        """The expert at a flat index of the grid is used."""
        ...

    def scores(self) -> np.ndarray:
        """[L * E] finite floats: what is worth least is evicted first. May be a live view."""
        ...


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Eviction and prediction of one memory, and who must hear the signals for them, in this order."""

    eviction: EvictionPolicy
    predictor: Predictor | None
    listeners: tuple[SignalListener, ...]
