"""What an expert memory says of itself. Reads; may be called from any thread, values may be one step old."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from actors.experts.memory.store import ExpertStore
from cluster.status.expert_memory import TierStatus
from cluster.status.experts import LayerExperts
from cluster.types import Phase, Tier


def tiers_report(store: ExpertStore) -> tuple[TierStatus, ...]:
    """The tiers there are, fastest first."""
    moved = store.counters.bytes_moved
    tiers = [_arena_status(store, Tier.DEVICE, store.budget_bytes, store.num_resident, 0)]
    if store.ram_budget_bytes:
        tiers.append(_arena_status(store, Tier.RAM, store.ram_budget_bytes, store.ram_resident, moved[Tier.RAM]))
    for tier in store.source_tiers:
        tiers.append(
            TierStatus(tier=tier, budget_bytes=None, resident_bytes=0, num_resident=0, bytes_moved=moved[tier])
        )
    return tuple(tiers)


def layers_report(
    store: ExpertStore, activations: Mapping[int, Mapping[Phase, tuple[int, ...]]]
) -> tuple[LayerExperts, ...]:
    """Residency and counts per layer."""
    counters = store.counters
    return tuple(
        LayerExperts(
            layer=layer,
            num_experts=store.grid.num_experts,
            resident=_indices(store.resident(layer)),
            activations=activations.get(layer, {}),
            hits=int(counters.hits[row]),
            misses=sum(int(values[row]) for values in counters.misses.values()),
            ram_resident=_indices(store.in_ram(layer)),
            misses_by_tier={tier: int(values[row]) for tier, values in counters.misses.items()},
            late=int(counters.late[row]),
            prefetch_used=int(counters.prefetch_used[row]),
            prefetch_wasted=int(counters.prefetch_wasted[row]),
            prefetch_dropped=int(counters.prefetch_dropped[row]),
            stall_s=float(counters.stall_s[row]),
        )
        for row, layer in enumerate(store.grid.layers)
    )


def _arena_status(store: ExpertStore, tier: Tier, budget_bytes: int, num_resident: int, moved: int) -> TierStatus:
    return TierStatus(
        tier=tier,
        budget_bytes=budget_bytes,
        resident_bytes=num_resident * store.slot_bytes,
        num_resident=num_resident,
        bytes_moved=moved,
        emulated=tier is Tier.RAM and store.link_is_emulated,
    )


def _indices(present: np.ndarray) -> tuple[int, ...]:
    return tuple(np.flatnonzero(present).tolist())
