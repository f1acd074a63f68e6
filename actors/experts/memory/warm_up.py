"""Fills a fresh expert memory with what was used most in the cluster, before its worker takes requests.

Knows counts and a memory; knows no policy: whatever evicts or prefetches takes over from there.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping

import numpy as np

from actors.experts.memory.store import ExpertStore
from cluster.logs import log_event
from cluster.protocols import StateStore
from cluster.types import Phase

_LOG = logging.getLogger(__name__)
_TIMEOUT_S = 30.0  # ready and half warm is better than late: the rest comes on demand


def warm_up(store: ExpertStore, statistics: StateStore, fingerprint: str, *, timeout_s: float = _TIMEOUT_S) -> int:
    """Fetch the experts that all workers together used most, as many as fit; how many are in the fast tier then.

    Statistics that cannot be read, or that nobody has written, cost the warm start and nothing else.
    """
    try:
        uses = _uses(store, statistics.activations(fingerprint))
    except ConnectionError as error:
        log_event(_LOG, logging.WARNING, "the expert memory starts cold", reason=str(error))
        return store.num_resident
    if not uses.any():
        return store.num_resident
    _fetch(store, uses, timeout_s)
    log_event(_LOG, logging.INFO, "expert memory is warm", experts=store.num_resident, slots=store.num_slots)
    return store.num_resident


def _uses(store: ExpertStore, counts: Mapping[Phase, Mapping[int, Mapping[int, int]]]) -> np.ndarray:
    """[N] float32 by index of the grid. Decoding counts: prompts use nearly every expert, and once."""
    grid = store.grid
    uses = np.zeros((grid.num_layers, grid.num_experts), dtype=np.float32)
    by_layer = counts.get(Phase.DECODE) or counts.get(Phase.PREFILL) or {}
    for row, layer in enumerate(grid.layers):
        for expert, count in by_layer.get(layer, {}).items():
            uses[row, expert] = count
    return uses.reshape(-1)


def _fetch(store: ExpertStore, uses: np.ndarray, timeout_s: float) -> None:
    order = np.argsort(-uses, kind="stable")[: int((uses > 0).sum())]
    ram_slots = store.ram_budget_bytes // store.slot_bytes
    store.want(_first(order, store.num_slots, uses), _first(order, ram_slots, uses))
    is_done = store.wait_idle(timeout_s)
    store.want(None)
    store.rank(order[::-1].tolist())  # they came in the other order: by recency the best would leave first
    if not is_done:
        log_event(_LOG, logging.INFO, "the expert memory is not filled", waited_s=timeout_s)


def _first(order: np.ndarray, num: int, uses: np.ndarray) -> np.ndarray:
    """`uses` of the first `num` in order, 0 for all others."""
    wanted = np.zeros_like(uses)
    wanted[order[:num]] = uses[order[:num]]
    return wanted
