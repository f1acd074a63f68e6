"""What a router adds to its view of the workers: what it sent since, what waits have been worth, what will be resident.

Pure. Shapes: W workers of the table, N experts.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from cluster.routing.worker_table import WorkerTable
from cluster.semantics.request_mix import RequestMix

_KEPT = 0.95  # of the past, a report
_LITTLE = 1e-9


@dataclass(slots=True)
class _Sums:
    """Decayed sums of one worker's reports."""

    steps: float = 0.0
    loads: float = 0.0
    step_ms: float = 0.0
    stall_ms: float = 0.0


class Calibration:
    """What workers really waited for experts, from the differences of their reports.

    factor: the time that tokens waited over what P(used) x expected cost says they would; 1 until there is any.
    """

    def __init__(self) -> None:
        self.factor = 1.0
        self._waited_ms = self._expected_ms = 0.0
        self._sums: dict[str, _Sums] = {}

    def compare(self, before: WorkerTable, after: WorkerTable, absent_ms: np.ndarray, prior: np.ndarray) -> None:
        """Learn from two reports of the same workers.

        Args: absent_ms: [W, N] of the workers before. prior: [N], since what waited were prompts of all kinds.
        """
        for report in after.reports:
            place = before.index.get(report.replica_id)
            earlier = None if place is None else before.reports[place]
            if earlier is None or earlier.worker_id != report.worker_id or report.steps <= earlier.steps:
                continue
            steps, stall_ms = report.steps - earlier.steps, 1e3 * max(report.stall_s - earlier.stall_s, 0.0)
            sums = self._sums.setdefault(report.replica_id, _Sums())
            sums.steps = _KEPT * sums.steps + steps
            sums.loads = _KEPT * sums.loads + report.misses - earlier.misses
            sums.step_ms = _KEPT * sums.step_ms + steps * 1e3 * report.step_s
            sums.stall_ms = _KEPT * sums.stall_ms + stall_ms
            if absent_ms.shape[1] == len(prior):
                num_tokens = steps * (report.num_running + earlier.num_running) / 2
                expected_ms = num_tokens * float(prior @ absent_ms[place])
                self._expected_ms = _KEPT * self._expected_ms + expected_ms
                self._waited_ms = _KEPT * self._waited_ms + stall_ms
        if self._expected_ms > _LITTLE and self._waited_ms > 0:
            self.factor = self._waited_ms / self._expected_ms

    def compute_ms(self, replica_id: str) -> float:
        """Of a decode step, without waiting for experts; 0 before it is known."""
        sums = self._sums.get(replica_id)
        return max(sums.step_ms - sums.stall_ms, 0.0) / sums.steps if sums else 0.0

    def kept(self, replica_id: str, num_slots: float, num_steps: float) -> float:
        """How much of a memory that loads as it did will be the same, on average over so many steps, 0 to 1."""
        sums = self._sums.get(replica_id)
        loads = sums.loads / sums.steps * num_steps if sums else 0.0
        return min(1.0, num_slots / loads) if loads > 0 else 1.0


def expected_absence(table: WorkerTable, place: int, mix: RequestMix | None, kept: float) -> np.ndarray:
    """[N] what a use of each expert is expected to wait at a worker, ms, over the steps to come.

    `kept` of the memory stays as it was reported; the rest becomes what the requests there make of it.
    """
    resident = table.resident[place]
    to_come = None if mix is None else mix.residency(float(resident.sum()))
    if to_come is None or len(to_come) != len(resident):
        return table.miss_ms[place] * ~resident
    return table.miss_ms[place] * (1 - (kept * resident + (1 - kept) * to_come)).astype(np.float32)


class SentRequest(NamedTuple):
    """num_requests: +1 for one that was sent, -1 for one that is over. uses: [N], if known."""

    at_s: float
    num_requests: int
    num_tokens: int
    uses: np.ndarray | None


class SentSince:
    """What a router sent to workers after they made their last reports.

    counts: [W] requests, less those that are over. tokens: [W] of their prompts.
    """

    def __init__(self) -> None:
        self.counts = np.zeros(0)
        self.tokens = np.zeros(0)
        self._events: dict[str, list[SentRequest]] = {}

    def add(self, place: int, replica_id: str, event: SentRequest) -> None:
        """Something happened after the report."""
        self._events.setdefault(replica_id, []).append(event)
        self.counts[place] += event.num_requests
        self.tokens[place] += event.num_tokens

    def of(self, replica_id: str) -> list[SentRequest]:
        """What the worker has not reported yet."""
        return self._events.get(replica_id, [])

    def keep_after(self, reported_s: Mapping[str, float]) -> None:
        """Forget what these reports contain, and workers that are not among them. The order is that of the counts."""
        self._events = {
            replica_id: [event for event in self._events.get(replica_id, []) if event.at_s > since_s]
            for replica_id, since_s in reported_s.items()
        }
        self.counts, self.tokens = (
            np.array([sum(getattr(event, name) for event in events) for events in self._events.values()], np.float64)
            for name in ("num_requests", "num_tokens")
        )
