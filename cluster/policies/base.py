"""What a policy is: a value for every expert, kept up to date by what is heard. Knows experts; knows no memory.

Which of the residents goes first is the same for all policies: see eviction_order.py. What a scorer knows of gates it
hears as a `SignalListener`; a scorer that needs no signals (lru, lfu) costs none.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import numpy as np

from cluster.policies.policy_state import StatefulPolicy
from cluster.policies.prefetch.base import Predictor
from cluster.policies.signals import SignalListener


class Scorer(Protocol):
    """Values experts."""

    def on_use(self, indices: Sequence[int]) -> None:
        """The experts of a layer that are used now, each once, as flat indices of the grid."""
        ...

    def scores(self) -> np.ndarray:
        """[L * E] finite floats: what is worth least is evicted first. May be a live view."""
        ...


@dataclass(frozen=True, slots=True)
class PolicySet:
    """Values and prediction of one memory, and who must hear the signals for them, in this order.

    learned: what is worth keeping beyond this process, by name (see policy_state.py).
    """

    scorer: Scorer
    predictor: Predictor | None
    listeners: tuple[SignalListener, ...]
    learned: Mapping[str, StatefulPolicy] = field(default_factory=dict[str, StatefulPolicy])
