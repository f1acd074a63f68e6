"""The transfer queue into one arena: who goes next, chunk by chunk, on the threads of that way.

Demands go first, in the order they were asked for; a prefetch is begun only when none waits, and gives way after the
chunk under way. Knows transfers and threads; who is worth a slot is decided by `choose`, what follows an end by `done`.
Everything but the copying itself happens under the store's lock.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from actors.experts.memory.links import MemoryLink
from cluster.errors import ExpertReadError
from cluster.types import Tier

_RATE = 0.1  # of the newest chunk in the average


@dataclass(slots=True, eq=False)
class ExpertTransfer:
    """One expert on its way into a slot. Chunks are issued to threads one by one; `landed` counts those that ended.

    asked_s: from when on it could have been under way (time.perf_counter).
    """

    index: int
    slot: int
    link: MemoryLink
    num_chunks: int
    is_demand: bool
    asked_s: float = 0.0
    issued: int = 0
    landed: int = 0
    is_cancelled: bool = False
    error: ExpertReadError | None = None

    @property
    def is_over(self) -> bool:
        """Nothing of it is in a thread, and nothing more will be."""
        return self.issued == self.landed and (self.issued == self.num_chunks or self.stops)

    @property
    def stops(self) -> bool:
        """Whether no more chunks are to be issued."""
        return self.is_cancelled or self.error is not None


class TransferQueue:
    """Threads that bring experts into one arena.

    transfers: under way or waiting, by expert, in the order of beginning. expert_s: average time one takes
    on one thread, expert_s_from: of those that came from a tier, expert_cpu_s: processor time of that. demand_s: thread
    seconds spent on demands since start. late_s: how late chunks of prefetches began, on average, after the emulated
    link had ended the one before.
    """

    def __init__(
        self,
        name: str,
        lock: threading.Lock,
        num_threads: int,
        *,
        choose: Callable[[], ExpertTransfer | None],
        done: Callable[[ExpertTransfer], None],
        moved: Callable[[ExpertTransfer, int], None],
        bytes_per_s: float = 0.0,
    ) -> None:
        """Args: bytes_per_s: of a link that is emulated: a chunk takes as long, the copy included; 0: as it comes.

        Called under `lock` by the queue's own threads: choose: the next prefetch, with a slot of its own, or None.
        done: a transfer is over: complete, cancelled or failed. moved: so many bytes of a transfer were moved."""
        self.num_threads = num_threads
        self.transfers: dict[int, ExpertTransfer] = {}
        self.expert_s = self.expert_cpu_s = 0.0
        self.expert_s_from: dict[Tier, float] = {}
        self.demand_s = self.late_s = 0.0
        self._num_ahead = 0  # chunks
        self.bytes_per_s = bytes_per_s
        self._free_at_s = self._idle_from_s = self._woken_s = time.perf_counter()
        self._choose, self._done, self._moved = choose, done, moved
        self._lock = lock
        self._work = threading.Condition(lock)
        self._stopped = False
        self._may_choose = False
        self._threads = [
            threading.Thread(target=self._run, name=f"{name}-{i}", daemon=True) for i in range(num_threads)
        ]

    @property
    def is_idle(self) -> bool:
        """Whether nothing is under way, and nothing will be unless somebody asks."""
        return not self.transfers and not self._may_choose

    def start(self) -> None:
        """Begin to move."""
        self._may_choose = True
        for thread in self._threads:
            thread.start()

    def add(self, transfer: ExpertTransfer) -> None:
        """Queue one; under the lock."""
        transfer.asked_s = time.perf_counter()
        self.transfers[transfer.index] = transfer
        self._work.notify(min(transfer.num_chunks, self.num_threads))

    def wake(self) -> None:
        """There may be something to choose; under the lock."""
        self._woken_s = time.perf_counter()
        self._may_choose = True
        self._work.notify_all()

    def cancel(self, transfer: ExpertTransfer) -> bool:
        """Give one up unless its last chunk is under way; whether it is over now. If not, `done` says when it is.

        Under the lock.
        """
        if transfer.issued == transfer.num_chunks:
            return False
        transfer.is_cancelled = True
        if transfer.is_over:
            self._remove(transfer)
        return transfer.is_over

    def close(self, timeout_s: float) -> None:
        """End after the chunks under way; a thread that hangs in the system for longer is left behind."""
        with self._lock:
            self._stopped = True
            self._work.notify_all()
        for thread in self._threads:
            thread.join(timeout_s)

    def _run(self) -> None:
        while True:
            with self._lock:
                transfer = self._next()
                while transfer is None and not self._stopped:
                    self._may_choose = False
                    self._work.wait()
                    transfer = self._next()
                if self._stopped or transfer is None:
                    return
                chunk = transfer.issued
                transfer.issued += 1
            self._move(transfer, chunk)

    def _next(self) -> ExpertTransfer | None:
        ahead: ExpertTransfer | None = None
        demands_run = False
        for transfer in self.transfers.values():
            demands_run = demands_run or transfer.is_demand
            if transfer.issued < transfer.num_chunks and not transfer.stops:
                if transfer.is_demand:
                    return transfer
                ahead = ahead or transfer
        if demands_run or self._stopped:  # several threads share one way: a prefetch would slow the demand's down
            return None
        if ahead is None:
            ahead = self._choose()
            if ahead is not None:
                ahead.asked_s = self._woken_s
                self.transfers[ahead.index] = ahead
        return ahead

    def _move(self, transfer: ExpertTransfer, chunk: int) -> None:
        began_s, error, num_bytes = time.perf_counter(), None, 0
        late_s = began_s - max(self._idle_from_s, transfer.asked_s) if self.bytes_per_s else 0.0
        began_cpu_s = time.thread_time()
        try:
            num_bytes = transfer.link.copy_chunk(transfer.index, chunk, transfer.slot)
        except ExpertReadError as failure:
            error = failure
        except Exception as failure:  # noqa: BLE001 - top of a thread: whoever waits must be told
            error = ExpertReadError(f"loading from {transfer.link.tier} failed: {failure!r}")
        if self.bytes_per_s:  # by the link's own time: that this thread woke up late does not slow the link down
            self._free_at_s = max(self._free_at_s, transfer.asked_s) + num_bytes / self.bytes_per_s
            self._idle_from_s = max(self._free_at_s, time.perf_counter())
            time.sleep(max(0.0, self._free_at_s - time.perf_counter()))
        took_s, cpu_s = time.perf_counter() - began_s, time.thread_time() - began_cpu_s
        with self._lock:
            transfer.landed += 1
            transfer.error = transfer.error or error
            rate = _RATE if self.expert_s else 1.0
            expert_s, tier = took_s * transfer.num_chunks, transfer.link.tier
            self.expert_s += rate * (expert_s - self.expert_s)
            before_s = self.expert_s_from.setdefault(tier, expert_s)
            self.expert_s_from[tier] = before_s + _RATE * (expert_s - before_s)
            self.expert_cpu_s += rate * (cpu_s * transfer.num_chunks - self.expert_cpu_s)
            if transfer.is_demand:
                self.demand_s += took_s
            else:
                self._num_ahead += 1
                self.late_s += (late_s - self.late_s) / self._num_ahead
            self._moved(transfer, num_bytes)
            if transfer.is_over:
                self._remove(transfer)
                self._done(transfer)
                if self.num_threads > 1:  # those that waited for a demand's last chunk
                    self._work.notify_all()

    def _remove(self, transfer: ExpertTransfer) -> None:
        del self.transfers[transfer.index]
        self._may_choose = True
