"""What a batch of an expert host costs, learned from its batches: so much for each distinct expert and for each row.

Pure. The two are told apart only where batches differ; where they do not, the time is put down to experts, because a
host that reads weights for few rows is bound by memory.
"""

from __future__ import annotations

_FORGETS = 0.99  # of what was known, at every batch: about the last hundred count
_RIDGE, _ROW_RIDGE = 1e-3, 2e-2  # shares of the squares seen: where nothing tells them apart, rows get a twentieth


class BatchCost:
    """Least squares of seconds over (experts, rows), without an intercept, never negative, forgetting slowly.

    expert_s, row_s: seconds of one distinct expert and of one row of one; 0 until a batch was seen.
    """

    def __init__(self) -> None:
        self.expert_s = self.row_s = 0.0
        self._nn = self._nr = self._rr = self._nt = self._rt = 0.0

    def observe(self, num_experts: int, num_rows: int, seconds: float) -> None:
        """A batch of `num_rows` (row, choice) pairs over `num_experts` distinct experts took `seconds`."""
        n, r = float(num_experts), float(num_rows)
        self._nn = _FORGETS * self._nn + n * n
        self._nr = _FORGETS * self._nr + n * r
        self._rr = _FORGETS * self._rr + r * r
        self._nt = _FORGETS * self._nt + n * seconds
        self._rt = _FORGETS * self._rt + r * seconds
        nn, rr = self._nn * (1 + _RIDGE), self._rr * (1 + _ROW_RIDGE)
        determinant = nn * rr - self._nr * self._nr
        if determinant <= 0:
            return
        expert_s = (rr * self._nt - self._nr * self._rt) / determinant
        row_s = (nn * self._rt - self._nr * self._nt) / determinant
        if row_s < 0:
            expert_s, row_s = self._nt / self._nn, 0.0
        elif expert_s < 0:
            expert_s, row_s = 0.0, self._rt / self._rr
        self.expert_s, self.row_s = expert_s, row_s
