"""Ways to place experts, ours and others', and how each is scored.

A placement here is how many replicas of each expert each host has, (L, P, E) int: others may put two on one host.
Replicas share an expert's load evenly (EPLB's assumption).

Shapes: L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.placement.sources import Periods
from cluster.placement import (
    PhaseLoad,
    PlacementHost,
    PlacementInputs,
    forecast,
    plan_placement,
)
from cluster.placement.inputs import owned_array
from cluster.placement.plan import Placement, PlacementPlan
from cluster.types import Phase

EXPERT_BYTES = 32 * 102_400  # of the demo model widened 32 times
LINK_BYTES_PER_S = 1e9
TOKENS_PER_S = 100.0
ROW_S = 1e-4
HORIZON_S = 600.0
_RANDOM_DRAWS = 20


def score(copies_LPE: np.ndarray, counts_LE: np.ndarray) -> float:
    """Largest over mean load of the hosts, each layer weighed by its load."""
    load_LP = np.einsum("lpe,le->lp", copies_LPE / copies_LPE.sum(axis=1, keepdims=True), counts_LE)
    return float(load_LP.max(axis=1).sum() / load_LP.mean(axis=1).sum())


def contiguous(num_layers: int, num_experts: int, num_hosts: int) -> np.ndarray:
    """Blocks of neighbours, as expert parallelism begins everywhere."""
    bounds = [num_experts * host // num_hosts for host in range(num_hosts + 1)]
    copies = np.zeros((num_layers, num_hosts, num_experts), dtype=np.int64)
    for host in range(num_hosts):
        copies[:, host, bounds[host] : bounds[host + 1]] = 1
    return copies


def random_score(counts_LE: np.ndarray, num_hosts: int) -> float:
    """Median over draws of equal shares dealt by chance."""
    num_layers, num_experts = counts_LE.shape
    scores: list[float] = []
    for seed in range(_RANDOM_DRAWS):
        rng = np.random.default_rng(seed)
        copies = contiguous(num_layers, num_experts, num_hosts)
        scores.append(score(np.stack([layer[:, rng.permutation(num_experts)] for layer in copies]), counts_LE))
    return float(np.median(scores))


def eplb(counts_LE: np.ndarray, num_hosts: int, spare: float) -> np.ndarray:
    """DeepSeek's EPLB as published (global policy): equal slots within the room there is, duplicates on a host, and no
    regard for what is."""
    num_layers, num_experts = counts_LE.shape
    slots = max(int(num_experts * (1 + spare)) // num_hosts, -(-num_experts // num_hosts)) * num_hosts
    copies = np.zeros((num_layers, num_hosts, num_experts), dtype=np.int64)
    for layer, weight in enumerate(counts_LE):
        experts, count = list(range(num_experts)), np.ones(num_experts)
        for _ in range(slots - num_experts):
            hottest = int((weight / count).argmax())
            experts.append(hottest)
            count[hottest] += 1
        load, held = np.zeros(num_hosts), np.zeros(num_hosts, dtype=int)
        for expert in sorted(experts, key=lambda e: -weight[e] / count[e]):
            host = int(np.where(held < slots // num_hosts, load, np.inf).argmin())
            copies[layer, host, expert] += 1
            load[host] += weight[expert] / count[expert]
            held[host] += 1
    return copies


def inputs_for(
    counts_LE: np.ndarray, top_k: int, num_hosts: int, spare: float, *, start: np.ndarray | None = None
) -> PlacementInputs:
    """Equal hosts with room for `spare` more experts, from contiguous blocks or `start`; bound by compute."""
    num_layers, num_experts = counts_LE.shape
    start = contiguous(num_layers, num_experts, num_hosts) if start is None else start
    capacity = -(-int(num_layers * num_experts * (1 + spare)) // num_hosts)
    return PlacementInputs(
        layers=tuple(range(num_layers)),
        num_experts=num_experts,
        top_k=top_k,
        expert_bytes=EXPERT_BYTES,
        hosts=tuple(PlacementHost(index=host, capacity=capacity, row_s=ROW_S) for host in range(num_hosts)),
        current=as_placement(start),
        loads={Phase.DECODE: PhaseLoad(expected_LE=forecast(counts_LE), tokens_per_s=TOKENS_PER_S)},
        horizon_s=HORIZON_S,
        bytes_per_s=LINK_BYTES_PER_S,
    )


def ours(counts_LE: np.ndarray, top_k: int, num_hosts: int, spare: float) -> tuple[np.ndarray, PlacementPlan]:
    """As the scheduler plans: by the forecast, from contiguous blocks, every change worth twice its cost."""
    inputs = inputs_for(counts_LE, top_k, num_hosts, spare)
    plan = plan_placement(inputs)
    return as_copies(inputs, plan.placement), plan


def oracle(periods: Periods, num_hosts: int, spare: float) -> float:
    """The best of all placements here if the second period were known, carried for nothing."""

    inputs = inputs_for(periods.second, periods.top_k, num_hosts, spare)
    free = replace(
        inputs,
        loads={Phase.DECODE: PhaseLoad(expected_LE=periods.second, tokens_per_s=TOKENS_PER_S)},
        bytes_per_s=1e18,
        balance_threshold=1.0,
    )
    found = as_copies(free, plan_placement(free).placement)
    candidates: list[np.ndarray] = [found, eplb(periods.second, num_hosts, spare)]
    return min(score(copies, periods.second) for copies in candidates)


def as_placement(copies_LPE: np.ndarray) -> Placement:
    return Placement(
        epoch=1,
        hosts={
            host: {layer: tuple(np.flatnonzero(rows[host]).tolist()) for layer, rows in enumerate(copies_LPE)}
            for host in range(copies_LPE.shape[1])
        },
    )


def as_copies(inputs: PlacementInputs, placement: Placement) -> np.ndarray:

    return owned_array(replace(inputs, current=placement)).astype(np.int64)


def transfers(before_LPE: np.ndarray, after_LPE: np.ndarray) -> int:
    """Experts that some host gets."""
    return int(np.maximum(after_LPE - before_LPE, 0).sum())
