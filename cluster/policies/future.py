"""All uses to come, for policies that know the future. Only replay can have one.

An event is one layer of one step; events are counted from 0 in the order of computation.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.policies.signals import GateSignal, Grid, Silent

NEVER = 2**40


class UsesToCome:
    """When each expert is used after each of its uses; computed once for many replays.

    uses: flat indices by event. following: the events at which these are used next. first: [L * E].
    """

    def __init__(self, grid: Grid, uses: Sequence[Sequence[int]]) -> None:
        """Args: uses: distinct experts (within their layer) of every event; event i is of row i % L."""
        following: list[list[int]] = []
        coming = [NEVER] * grid.size
        self.uses: list[list[int]] = []
        for i in range(len(uses) - 1, -1, -1):
            flat = [(i % grid.num_layers) * grid.num_experts + expert for expert in uses[i]]
            self.uses.append(flat)
            following.append([coming[index] for index in flat])
            for index in flat:
                coming[index] = i
        self.uses.reverse()
        following.reverse()
        self.following = following
        self.first = np.array(coming, dtype=np.int64)


class Future(Silent):
    """next_use: [L * E] int64, the event at which each expert is used next, after the present one, `now`."""

    def __init__(self, known: UsesToCome) -> None:
        self.now = -1
        self.next_use = known.first.copy()
        self._known = known

    def on_gate(self, gate: GateSignal) -> None:
        self.now += 1
        self.next_use[self._known.uses[self.now]] = self._known.following[self.now]
