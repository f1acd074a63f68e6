"""How long one host takes to answer one worker, and what that is made of. Measured; knows numbers only."""

from __future__ import annotations

from collections import deque

from cluster.execution.batch_cost import BatchCost

_WINDOW = 100  # answers: the longest of them is about the 99th percentile
_ENOUGH = 16  # answers from which on that says something
_LEAST_S, _FACTOR = 0.05, 5.0  # a host may always take so long, and so many times its 99th percentile
_RATE = 0.1  # of the newest answer in an average
_FORGETS = 0.99  # of its costs, for every layer in which it was not asked: one that was dear once is tried again


class HostTimes:
    """Of one host. cost: of its batches. link_row_s: seconds per row that were not spent computing.

    Who is never asked is never measured: `estimate` falls while nothing is observed.
    """

    def __init__(self) -> None:
        self.cost = BatchCost()
        self.link_row_s = 0.0
        self._unseen = 1.0
        self._waits: dict[int, deque[float]] = {}  # by the number of rows, in powers of two

    def observe(self, num_rows: int, wait_s: float, busy_s: float = 0.0) -> None:
        """A frame of `num_rows` was answered after `wait_s`, or given up then."""
        self._waits.setdefault(num_rows.bit_length(), deque(maxlen=_WINDOW)).append(wait_s)
        if busy_s > 0:
            self._unseen = 1.0
            link_row_s = max(0.0, wait_s - busy_s) / num_rows
            self.link_row_s += (_RATE if self.link_row_s else 1.0) * (link_row_s - self.link_row_s)

    def estimate(self) -> tuple[float, float, float]:
        """Seconds of an expert, of a row, and of a row's way, to choose by; called once for each choice."""
        self._unseen *= _FORGETS
        return self.cost.expert_s * self._unseen, self.cost.row_s * self._unseen, self.link_row_s * self._unseen

    def patience_s(self, num_rows: int, longest_s: float) -> float:
        """How long to wait for an answer to so many rows; `longest_s` as long as too few such were seen."""
        waits = self._waits.get(num_rows.bit_length())
        if waits is None or len(waits) < _ENOUGH:
            return longest_s
        return min(longest_s, max(_LEAST_S, _FACTOR * max(waits)))
