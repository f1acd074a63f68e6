"""What plans and diagnoses are made from, out of the last reports and the shared statistics. Pure.

Shapes: C clusters of prompts and one for none, L MoE layers, E experts of a layer.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from cluster.control.diagnose import DiagnosisInputs
from cluster.control.roster import Roster
from cluster.placement.cost import PhaseLoad, PlacementHost
from cluster.placement.forecast import forecast
from cluster.placement.inputs import PlacementInputs
from cluster.placement.plan import Placement
from cluster.semantics.statistics import COUNT, DECODE, PREFILL, ExpertStatistics
from cluster.status.reports import HostReport
from cluster.types import Phase, StartupPhase

_HORIZON_S = 600.0  # a placement is not counted on for longer, nor for longer than what it was planned by
_ROWS = {Phase.PREFILL: PREFILL, Phase.DECODE: DECODE}


def placement_inputs(
    roster: Roster,
    statistics: ExpertStatistics,
    current: Placement,
    *,
    half_life_s: float,
    max_bytes: int | None,
    bytes_per_s: float,
    now_s: float,
) -> PlacementInputs:
    """A snapshot to plan from. Hosts of `current` that are not ready are lost.

    Args:
        half_life_s: of the statistics: it makes rates of decayed sums.
        max_bytes: that may be carried now, bytes_per_s: how fast.
    """
    hosts = tuple(
        PlacementHost(
            index=report.index,
            node_id=report.node_id,
            capacity=report.capacity,
            ram_capacity=report.ram_capacity,
            expert_s=report.expert_s,
            row_s=report.row_s,
            miss_s=report.miss_s,
            is_draining=roster.is_leaving(report),
            comes=report.node_id in roster.returning or report.index not in current.hosts,
        )
        for report, _ in roster.hosts(now_s)
        if report.phase is StartupPhase.READY
    )
    return PlacementInputs(
        layers=statistics.layers,
        num_experts=statistics.num_experts,
        top_k=roster.top_k,
        expert_bytes=max((report.expert_bytes for report, _ in roster.hosts(now_s)), default=0),
        hosts=hosts,
        current=current,
        loads=_loads(roster, statistics, half_life_s, now_s),
        horizon_s=min(half_life_s, _HORIZON_S),
        max_bytes=max_bytes,
        bytes_per_s=bytes_per_s,
    )


def diagnosis_inputs(
    roster: Roster,
    statistics: ExpertStatistics,
    current: Placement | None,
    *,
    half_life_s: float,
    kinds: ExpertStatistics | None,
    mutual_information: float | None,
    now_s: float,
) -> DiagnosisInputs:
    """A snapshot to diagnose.

    Args:
        current: None without hosts: then one stands for the workers' own memories.
        kinds: what knowledge was made from: its kinds of prompt are those that are told of; None: there is none.
    """
    has_hosts = current is not None
    if current is None:
        everything = {layer: tuple(range(statistics.num_experts)) for layer in statistics.layers}
        size = len(statistics.layers) * statistics.num_experts
        roster = roster.copy()
        roster.note_host(_stand_in(size), now_s)
        current = Placement(epoch=0, hosts={0: everything})
    return DiagnosisInputs(
        placement=placement_inputs(
            roster, statistics, current, half_life_s=half_life_s, max_bytes=None, bytes_per_s=1e9, now_s=now_s
        ),
        has_hosts=has_hosts,
        counts=_counts(statistics),
        kinds=kinds.decode_counts()[:-1] if kinds is not None and kinds.num_clusters else None,
        mutual_information=mutual_information,
        num_workers=len(roster.workers(now_s)),
    )


def _counts(statistics: ExpertStatistics) -> dict[Phase, np.ndarray]:
    """(L, E) activations of all prompts, by phase."""
    return {phase: statistics.values[:, row, :, :, COUNT].sum(axis=0) for phase, row in _ROWS.items()}


def _loads(roster: Roster, statistics: ExpertStatistics, half_life_s: float, now_s: float) -> Mapping[Phase, PhaseLoad]:
    """Loads by phase. A sum that halves in `half_life_s` stands at rate x half_life / ln 2 once it has run in."""
    reports = [report for report, _ in roster.workers(now_s)]
    running = [report.num_running for report in reports if report.num_running]
    decode_rows = sum(running) / len(running) if running else 1.0
    rows = {Phase.DECODE: decode_rows, Phase.PREFILL: max(decode_rows, _rows_per_batch(roster, now_s))}
    loads: dict[Phase, PhaseLoad] = {}
    for phase, counts in _counts(statistics).items():
        tokens = float(counts.sum(axis=1).mean()) / max(roster.top_k, 1)
        loads[phase] = PhaseLoad(
            expected_LE=forecast(counts),
            tokens_per_s=tokens * math.log(2) / half_life_s,
            rows_per_batch=rows[phase],
        )
    return loads


def _rows_per_batch(roster: Roster, now_s: float) -> float:
    """Of the hosts so far, all phases together."""
    reports = [report for report, _ in roster.hosts(now_s)]
    batches = sum(report.num_batches for report in reports)
    return sum(report.num_rows for report in reports) / batches if batches else 1.0


def _stand_in(capacity: int) -> HostReport:
    """One process with all experts."""
    return HostReport(
        host_id="workers", index=0, node_id="", phase=StartupPhase.READY, capacity=capacity, expert_s=1e-3
    )
