"""Clusters to plan for: placements, loads and memory, and what may be asked of a plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import hypothesis.strategies as st
import numpy as np

from cluster.placement import (
    PhaseLoad,
    PlacementHost,
    PlacementInputs,
    even_placement,
)
from cluster.placement.cost import busiest_s, demands_of
from cluster.placement.inputs import owned_array
from cluster.placement.plan import Placement
from cluster.types import Phase, Tier

FREE = 1e18  # bytes per second


def placed(*hosts: Mapping[int, tuple[int, ...]]) -> Placement:
    return Placement(epoch=3, hosts=dict(enumerate(hosts)))


def inputs_of(
    loads: Mapping[Phase, list[list[float]]],
    current: Placement,
    *,
    capacity: int = 100,
    num_hosts: int | None = None,
    tokens_per_s: float = 100.0,
) -> PlacementInputs:
    """Equal hosts, bound by compute; layer l is row l."""
    first = np.array(next(iter(loads.values())))
    hosts = sorted(current.hosts) if num_hosts is None else list(range(num_hosts))
    return PlacementInputs(
        layers=tuple(range(len(first))),
        num_experts=first.shape[1],
        top_k=1,
        expert_bytes=1000,
        hosts=tuple(PlacementHost(index=i, node_id=f"n{i}", capacity=capacity, row_s=1e-3) for i in hosts),
        current=current,
        loads={
            phase: PhaseLoad(expected_LE=np.array(rows, dtype=float), tokens_per_s=tokens_per_s)
            for phase, rows in loads.items()
        },
        bytes_per_s=FREE,
    )


def busiest(inputs: PlacementInputs, placement: Placement) -> float:
    found = demands_of(inputs.loads, inputs.owners, inputs.top_k)
    return busiest_s(found, owned_array(replace(inputs, current=placement)))


def owners_of(placement: Placement, layer: int, expert: int) -> set[int]:
    return {host for host, layers in placement.hosts.items() if expert in layers.get(layer, ())}


def cluster_of(seed: int) -> PlacementInputs:
    """Hosts of different speed and memory, loads of two phases, a present placement that misses what lost hosts had."""
    rng = np.random.default_rng(seed)
    num_layers, num_experts, num_hosts = int(rng.integers(1, 4)), int(rng.integers(1, 10)), int(rng.integers(1, 6))
    hosts = tuple(
        PlacementHost(
            index=index,
            node_id=f"n{index % 3}",
            capacity=int(rng.integers(1, num_layers * num_experts + 3)),
            row_s=float(rng.choice([1e-3, 2e-3])),
            expert_s=float(rng.choice([0.0, 1e-3])),
            miss_s={Tier.DISK: 0.01} if rng.integers(2) else {},
            is_draining=bool(index and rng.random() < 0.2),
        )
        for index in range(num_hosts)
    )
    share = rng.choice([0.3, 0.7])
    held = rng.random((num_hosts + 1, num_layers, num_experts)) < share
    if rng.integers(2):  # all owned: nothing to repair
        held[0] |= ~held[:num_hosts].any(axis=0)
    return PlacementInputs(
        layers=tuple(range(num_layers)),
        num_experts=num_experts,
        top_k=1,
        expert_bytes=1000,
        hosts=hosts,
        current=Placement(
            epoch=3,
            hosts={
                index: {layer: tuple(np.flatnonzero(row).tolist()) for layer, row in enumerate(rows)}
                for index, rows in enumerate(held)
                if rng.random() < 0.9 or index == 0
            },
        ),
        loads={
            phase: PhaseLoad(
                expected_LE=rng.gamma(0.5, size=(num_layers, num_experts)) * (rng.random() < 0.9),
                tokens_per_s=float(rng.choice([0.0, 1.0, 1000.0])),
                rows_per_batch=float(rng.choice([1.0, 20.0])),
            )
            for phase in Phase
        },
        max_bytes=(None, 0, 2500, 10000)[int(rng.integers(4))],
        bytes_per_s=float(rng.choice([1e3, 1e6, FREE])),
    )


SEEDS = st.integers(0, 2**32 - 1)


def skewed(seed: int, num_layers: int = 2, num_experts: int = 8, num_hosts: int = 4) -> PlacementInputs:
    rng = np.random.default_rng(seed)
    loads = rng.gamma(0.5, size=(num_layers, num_experts)) + 0.01
    return inputs_of(
        {Phase.DECODE: loads.tolist()},
        placed(*even_placement(range(num_layers), num_experts, num_hosts)),
        capacity=num_layers * num_experts // num_hosts + 2,
    )
