"""Residency and activation by layer, of each process and of the cluster."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from cluster.types import Phase, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerExperts:
    """Experts of one layer: where they are (`resident`: fast tier), how often chosen; as in ExpertMemoryStatus."""

    layer: int
    num_experts: int
    resident: tuple[int, ...]
    activations: Mapping[Phase, tuple[int, ...]]
    hits: int
    misses: int
    ram_resident: tuple[int, ...] = ()
    misses_by_tier: Mapping[Tier, int] = field(default_factory=dict[Tier, int])
    late: int = 0
    prefetch_used: int = 0
    prefetch_wasted: int = 0
    prefetch_dropped: int = 0
    stall_s: float = 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerActivations:
    """How often the gate of one layer chose each expert, by phase."""

    layer: int
    activations: Mapping[Phase, tuple[int, ...]]


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterActivations:
    """Activations that all workers of the cluster counted, from the shared store; workers send every few seconds.

    `degraded` says in words why they are not up to date or not all workers'; None when they are.
    """

    layers: tuple[LayerActivations, ...]
    degraded: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class ExpertsReport:
    """Residency and activation per layer of one process's expert memory: a worker's or a host's.

    `activations` are what this process counted, so a host has none. `cluster` is a worker's view of the shared store.
    """

    owner_id: str
    layers: tuple[LayerExperts, ...]
    cluster: ClusterActivations | None = None
