"""The workers of a routing view as arrays, made once per view. Pure.

Shapes: W workers, in the order of their replica ids; N = L * E experts, layer-major.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from cluster.status.reports import RoutingView, WorkerReport
from cluster.types import StartupPhase, Tier

STALLED_S, STALLED_STEPS = 2.0, 20.0
SILENT_S = 10.0


class WorkerTable:
    """What the router knows of every worker. Times in milliseconds.

    num_running, num_waiting, max_open: [W] sequences. waiting_tokens: [W]. step_ms, prefill_ms: [W] of a decode step
    and of one prompt token; a worker that has not measured its own is taken for an average one. is_ready: [W] bool.
    is_well: [W] bool, makes progress and reports. reported_s: [W] on the router's clock. resident: [W, N] bool.
    miss_ms: [W, N] float32, what a use costs where the expert is not resident, by the tier that it would come from; 0
    where nothing was measured, and for workers that hold no experts (hosts do: they are equally far from all).
    """

    def __init__(self, view: RoutingView, now_s: float) -> None:
        rows = sorted(view.workers, key=lambda row: row[0].replica_id)
        self.reports = tuple(report for report, _ in rows)
        self.replica_ids = tuple(report.replica_id for report in self.reports)
        self.index = {replica_id: place for place, replica_id in enumerate(self.replica_ids)}
        ages_s = np.array([age_s for _, age_s in rows], dtype=np.float64)
        self.reported_s = now_s - ages_s
        self.num_running = self._column([report.num_running for report in self.reports])
        self.num_waiting = self._column([report.num_waiting for report in self.reports])
        self.max_open = self._column([report.max_open for report in self.reports])
        self.waiting_tokens = self._column([report.waiting_tokens for report in self.reports])
        self.step_ms = _measured([1e3 * report.step_s for report in self.reports])
        self.prefill_ms = _measured([1e3 * report.prefill_token_s for report in self.reports])
        self.is_ready = np.array([report.phase is StartupPhase.READY for report in self.reports], dtype=np.bool_)
        stalled_s = self._column([report.stalled_s for report in self.reports])
        self.is_well = (stalled_s <= np.maximum(STALLED_S, STALLED_STEPS * self.step_ms / 1e3)) & (ages_s <= SILENT_S)
        size = max((len(report.layers) * report.num_experts for report in self.reports), default=0)
        self.resident = np.zeros((len(rows), size), dtype=np.bool_)
        self.miss_ms = np.zeros((len(rows), size), dtype=np.float32)
        for place, report in enumerate(self.reports):
            if report.resident and len(report.layers) * report.num_experts == size:
                self.resident[place] = _bits(report.resident, size)
                self.miss_ms[place] = _miss_ms(report, size)

    def __len__(self) -> int:
        return len(self.reports)

    @staticmethod
    def _column(values: Sequence[float]) -> np.ndarray:
        return np.array(values, dtype=np.float64)


def _miss_ms(report: WorkerReport, size: int) -> np.ndarray:
    costs = np.full(size, 1e3 * _slow_s(report.miss_s), dtype=np.float32)
    if report.ram_resident and Tier.RAM in report.miss_s:
        costs[_bits(report.ram_resident, size)] = 1e3 * report.miss_s[Tier.RAM]
    return costs


def _slow_s(miss_s: Mapping[Tier, float]) -> float:
    """Of what is in no memory here: another node's if there is one, else the disk's."""
    costs = [miss_s[tier] for tier in (Tier.REMOTE, Tier.DISK, Tier.RAM) if miss_s.get(tier, 0.0) > 0]
    return costs[0] if costs else 0.0


def _bits(packed: bytes, size: int) -> np.ndarray:
    return np.unpackbits(np.frombuffer(packed, dtype=np.uint8), count=size).astype(np.bool_)


def _measured(values: Sequence[float]) -> np.ndarray:
    """Of who has not measured yet: the mean of the others, 0 where nobody has."""
    column = np.array(values, dtype=np.float64)
    known = column[np.isfinite(column) & (column > 0)]
    return np.where(np.isfinite(column) & (column > 0), column, known.mean() if len(known) else 0.0)
