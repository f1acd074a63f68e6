"""Evicts the expert that was not used for the longest time."""

from __future__ import annotations

from collections.abc import Collection

from cluster.types import ExpertId


class LruPolicy:
    """Least recently used, over all layers together."""

    def __init__(self) -> None:
        self._order: dict[ExpertId, None] = {}

    def on_use(self, expert: ExpertId) -> None:
        self._order.pop(expert, None)
        self._order[expert] = None

    def on_insert(self, expert: ExpertId) -> None:
        self.on_use(expert)

    def on_evict(self, expert: ExpertId) -> None:
        self._order.pop(expert, None)

    def choose_victim(self, pinned: Collection[ExpertId]) -> ExpertId | None:
        return next((expert for expert in self._order if expert not in pinned), None)
