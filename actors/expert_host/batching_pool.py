"""The second of a host's four classes: what waits to be computed. Frames of one layer that wait together run together.

Nothing waits for company: a batch is what is there when the device is free. Knows frames and time; knows no sockets and
no device.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from actors.data_plane.frames import DispatchFrame, RefusalReason
from actors.data_plane.task import DispatchTask


class BatchingPool:
    """First come, first served by layer; refuses what is too old to be worth computing or routed by another plan."""

    def __init__(self, *, max_rows: int, clock: Callable[[], float] = time.monotonic) -> None:
        """Args: max_rows: of a batch that joins several frames; a larger frame runs alone."""
        self._max_rows = max_rows
        self._clock = clock
        self._waiting: deque[DispatchTask] = deque()
        self.epoch = 1  # the published one: what a refusal names
        self.num_refused = 0
        self._taken: tuple[int, ...] = (1,)

    def __len__(self) -> int:
        return len(self._waiting)

    def set_epochs(self, epoch: int, taken: tuple[int, ...]) -> None:
        """Take frames of these epochs from now on. Args: epoch: the published one. May be called from any thread."""
        self.epoch, self._taken = epoch, taken

    def has_older(self, epoch: int) -> bool:
        """Whether frames of earlier epochs wait. May be called from any thread."""
        return any(task.frame.epoch < epoch for task in tuple(self._waiting))

    def add(self, task: DispatchTask) -> None:
        """Queue a frame."""
        self._waiting.append(task)

    def drain(self) -> list[DispatchTask]:
        """All that waits, when the host stops."""
        waiting, self._waiting = list(self._waiting), deque()
        return waiting

    def take(self) -> list[DispatchTask]:
        """The next batch: the oldest frame, and others of its layer, dtype and top-k that fit; empty if none."""
        while self._waiting:
            first = self._waiting.popleft()
            if self._is_refused(first):
                continue
            batch, num_rows, others = [first], len(first.frame.rows), deque[DispatchTask]()
            while self._waiting:
                task = self._waiting.popleft()
                if not _joins(first.frame, task.frame) or num_rows + len(task.frame.rows) > self._max_rows:
                    others.append(task)
                elif not self._is_refused(task):
                    batch.append(task)
                    num_rows += len(task.frame.rows)
            self._waiting = others
            return batch
        return []

    def _is_refused(self, task: DispatchTask) -> bool:
        frame = task.frame
        if frame.epoch not in self._taken:
            message = f"the frame was routed by plan epoch {frame.epoch}, this host is at {self.epoch}"
            task.refuse(RefusalReason.STALE_EPOCH, self.epoch, message)
        elif self._clock() - task.arrived_s > frame.deadline_us / 1e6:
            task.refuse(RefusalReason.LATE, self.epoch, f"not begun within the frame's {frame.deadline_us} us")
        else:
            return False
        self.num_refused += 1
        return True


def _joins(first: DispatchFrame, other: DispatchFrame) -> bool:
    return (
        first.layer == other.layer
        and first.rows.dtype == other.rows.dtype
        and first.expert_ids.shape[1] == other.expert_ids.shape[1]
    )
