"""Ring memory for steps that use nearly every expert: prefill and large batches.

Caching by value thrashes there: all experts are used in the order of layers, so what was just used is needed last. Most
slots keep the experts that are worth most for the steps after (pinned); through the rest, the ring, the others pass in
the order of their layers, fetched whole layers ahead. For the memory below the forecast reaches to the last layer: the
two stages run by themselves, each as far ahead as it has room (2D prefetch).

Source: MoESys (SE-MoE), arXiv 2205.10034: ring memory offloading, 2D prefetch. Where we differ: pinned is what the
policy values most, not the first layers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster.policies.signals import Grid

_NEARLY_ALL = 0.9


@dataclass(frozen=True, slots=True)
class RingOutlook:
    """scores: [N] for eviction. ahead: [N] priorities of what to fetch into the fast memory, below: into the next."""

    scores: np.ndarray
    ahead: np.ndarray
    below: np.ndarray


class RingPlan:
    """The plan of one large step."""

    def __init__(self, grid: Grid, num_slots: int, values: np.ndarray) -> None:
        """Args: values: [N], what the policy thinks experts are worth after the step."""
        self._grid = grid
        self.num_ring_slots = max(min(2 * grid.num_experts, num_slots // 2), 1)
        num_pinned = min(max(num_slots - self.num_ring_slots, 0), grid.size)
        self.pinned = np.zeros(grid.size, dtype=np.bool_)
        if num_pinned:
            self.pinned[np.argpartition(-values, num_pinned - 1)[:num_pinned]] = True

    def outlook(self, row: int) -> RingOutlook:
        """What follows from the gate of `row` having spoken; -1: from the beginning."""
        grid = self._grid
        distance = (np.arange(grid.num_layers) - row - 1) % grid.num_layers
        scores = np.repeat((grid.num_layers - distance) / grid.num_layers, grid.num_experts)
        scores += self.pinned * 2.0
        to_come = np.arange(grid.num_layers) > row
        below = np.repeat(np.where(to_come, 1.0 / (distance + 1), 0.0), grid.num_experts).astype(np.float32)
        # As many as the ring holds beside the layer that is computed; further ones would push nearer ones out.
        passing = np.cumsum((below > 0) & ~self.pinned)
        room = max(self.num_ring_slots - grid.num_experts, self.num_ring_slots // 2)
        return RingOutlook(scores, np.where(self.pinned | (passing <= room), below, np.float32(0)), below)


def uses_nearly_all(grid: Grid, num_rows: int) -> bool:
    """Whether a step of so many rows is expected to use nearly every expert of a layer.

    >>> grid = Grid((0, 1), num_experts=8, top_k=2)
    >>> uses_nearly_all(grid, num_rows=1), uses_nearly_all(grid, num_rows=16)
    (False, True)
    """
    return 1 - (1 - grid.top_k / grid.num_experts) ** num_rows >= _NEARLY_ALL


def ring_for_step(grid: Grid, num_slots: int, num_rows: int, values: Callable[[], np.ndarray]) -> RingPlan | None:
    """The plan of a step that uses nearly every expert of a memory that does not hold all; None: cache by value.

    Args: num_rows: of the step. values: [N], what the policy thinks experts are worth; asked only for a plan.

    >>> grid = Grid((0, 1, 2), num_experts=4, top_k=2)
    >>> plan = ring_for_step(grid, num_slots=6, num_rows=16, values=lambda: np.arange(12))
    >>> np.flatnonzero(plan.pinned)  # the other three slots are the ring
    array([ 9, 10, 11])
    >>> ring_for_step(grid, 6, 1, lambda: np.arange(12)), ring_for_step(grid, 12, 16, lambda: np.arange(12))
    (None, None)
    """
    if num_slots >= grid.size or not uses_nearly_all(grid, num_rows):
        return None
    return RingPlan(grid, num_slots, values())
