"""Where there is nothing to gain nothing must move; and hosts that are not alike."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.placement.methods import as_copies, inputs_for
from benchmarks.placement.sources import Periods
from benchmarks.shared.report import Report
from cluster.placement import PhaseLoad, PlacementInputs, plan_placement
from cluster.placement.cost import balance, demands_of
from cluster.placement.plan import Placement
from cluster.types import Phase

_SHAPE = (12, 32)  # layers, experts of a layer
_TOKENS = (100, 1_000, 10_000, 1_000_000)


def add_controls(report: Report, *, quick: bool) -> None:
    """Moves on loads without structure: exactly even, and what chance makes of even ones (each token by itself)."""
    even = np.full(_SHAPE, 1000.0)
    planned = [
        plan_placement(inputs_for(even, 4, num_hosts, spare)) for num_hosts in (2, 4, 8) for spare in (0.0, 0.25)
    ]
    report.at_most("moves on a uniform trace", sum(len(plan.moves) for plan in planned), 0)
    moved = tried = 0
    for seed in range(3 if quick else 20):
        rng = np.random.default_rng(seed)
        for tokens in _TOKENS:
            counts = rng.multinomial(4 * tokens, np.full(_SHAPE[1], 1 / _SHAPE[1]), size=_SHAPE[0]).astype(float)
            for num_hosts in (4, 8):
                moved += len(plan_placement(inputs_for(counts, 4, num_hosts, 0.25)).moves)
                tried += 1
    report.at_most(f"moves on independent noise, {tried} draws of {_TOKENS[0]:,} to {_TOKENS[-1]:,} tokens", moved, 0)


def unequal_hosts(report: Report, periods: Periods) -> None:
    """Four hosts, one twice as fast with twice the memory, one with half of it: planned on one period, scored on the
    next, against equal shares."""
    inputs = inputs_for(periods.first, periods.top_k, 4, 0.25)
    speeds, memories = (1.0, 1.0, 1.0, 2.0), (1.0, 1.0, 0.5, 2.0)
    hosts = tuple(
        replace(host, row_s=host.row_s / speed, capacity=int(host.capacity * memory))
        for host, speed, memory in zip(inputs.hosts, speeds, memories, strict=True)
    )
    planned = replace(inputs, hosts=hosts)
    plan = plan_placement(planned)
    now, then = (_scored(planned, periods, each) for each in (planned.current, plan.placement))
    report.notes.append(
        f"unequal hosts (speeds {speeds}, memories {memories}): largest over mean time {now:.3f} with equal shares, "
        f"{then:.3f} as planned; experts on each {as_copies(planned, plan.placement).sum(axis=(0, 2)).tolist()}"
    )
    report.at_most("unequal hosts: largest over mean time as planned", then, 1.10)


def _scored(inputs: PlacementInputs, periods: Periods, placement: Placement) -> float:
    load = PhaseLoad(expected_LE=periods.second, tokens_per_s=1.0)
    demands = demands_of({Phase.DECODE: load}, inputs.owners, inputs.top_k)
    return balance(demands, as_copies(inputs, placement).astype(bool))
