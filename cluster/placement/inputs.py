"""What a placement is planned from. Values, and how they become arrays.

Shapes: L MoE layers in the model's order, P hosts that may own experts in the order of their index, E experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from cluster.placement.cost import PhaseLoad, PlacementHost
from cluster.placement.plan import Placement
from cluster.types import ExpertId, Phase, Tier


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PlacementInputs:
    """A snapshot. Order of `hosts` does not matter: `index` names them. Those of `current` that are not among them are
    lost; those that drain still serve and are to own nothing.

    top_k: experts per token. horizon_s: how long a placement is expected to stay good. max_bytes: that may be carried
    now (None: no bound). bytes_per_s, stall_s: how fast experts are carried, what one costs those who wait meanwhile.
    balance_threshold: below it nothing is moved. failure_interval_s: mean time between losses of a host, recovery_s:
    how long its experts are missed then. pairs: (L, E, E), chance that a token activates both, where known.
    tiers: where each host has its experts now; hosts that do not say are left alone.
    """

    layers: tuple[int, ...]
    num_experts: int
    top_k: int
    expert_bytes: int
    hosts: tuple[PlacementHost, ...]
    current: Placement
    loads: Mapping[Phase, PhaseLoad]
    horizon_s: float = 600.0
    max_bytes: int | None = None
    bytes_per_s: float = 1e9
    stall_s: float = 0.0
    balance_threshold: float = 1.03
    failure_interval_s: float = 7 * 86400.0
    recovery_s: float = 10.0
    pairs: np.ndarray | None = None
    tiers: Mapping[int, Mapping[ExpertId, Tier]] = field(default_factory=dict[int, Mapping[ExpertId, Tier]])

    @property
    def transfer_s(self) -> float:
        """What carrying one expert costs."""
        return self.expert_bytes / self.bytes_per_s + self.stall_s

    @property
    def owners(self) -> tuple[PlacementHost, ...]:
        """Hosts that may own experts, by index."""
        return tuple(sorted((host for host in self.hosts if not host.is_draining), key=lambda host: host.index))


def owned_array(inputs: PlacementInputs) -> np.ndarray:
    """Who owns what now, (L, P, E) bool, over `inputs.owners`."""
    owners = inputs.owners
    owned = np.zeros((len(inputs.layers), len(owners), inputs.num_experts), dtype=bool)
    for place, host in enumerate(owners):
        held = inputs.current.hosts.get(host.index, {})
        for row, layer in enumerate(inputs.layers):
            owned[row, place, list(held.get(layer, ()))] = True
    return owned


def placement_of(inputs: PlacementInputs, owned_LPE: np.ndarray, epoch: int) -> Placement:
    """The value of an array; every host is named, with every layer."""
    return Placement(
        epoch=epoch,
        hosts={
            host.index: {
                layer: tuple(np.flatnonzero(owned_LPE[row, place]).tolist()) for row, layer in enumerate(inputs.layers)
            }
            for place, host in enumerate(inputs.owners)
        },
    )


def own_limits(capacity_P: list[int], num_layers: int, num_experts: int) -> np.ndarray:
    """Experts that each host may own, (P,) int: what its memory holds, at most all.

    If all memories together hold fewer experts than there are, each owns its share of all (largest remainder, ties by
    index), and what does not fit lies on slower tiers.
    """
    total = num_layers * num_experts
    limit = np.minimum(np.array(capacity_P, dtype=np.int64), total)
    if int(limit.sum()) >= total:
        return limit
    weight = limit if limit.any() else np.ones_like(limit)
    exact = weight * total / int(weight.sum())
    whole = np.floor(exact).astype(np.int64)
    for host in np.argsort(-(exact - whole), kind="stable")[: total - int(whole.sum())]:
        whole[host] += 1
    return np.minimum(whole, total)
