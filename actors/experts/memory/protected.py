"""Experts that a memory is to have: fetched ahead of need, and evicted after all others. What a host owns.

Knows stages and experts as indices; who owns what is decided elsewhere (actors/expert_host/owned_experts.py).
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

from actors.experts.memory.stage import MemoryStage
from actors.weights.slots import SlotForm

_POLL_S = 2e-3

Result = TypeVar("Result")


class ProtectedExperts:
    """A view of one store; of experts as flat indices of its grid. May be used from any thread."""

    def __init__(self, form: SlotForm, stages: Sequence[MemoryStage], lock: threading.Lock) -> None:
        """Args: stages: from the fastest down."""
        self._form, self._stages, self._lock = form, tuple(stages), lock
        self._fast = stages[0]
        self._priority = self._expected = np.zeros(form.grid.size, dtype=np.float32)

    def protect(self, protected: np.ndarray, priority: np.ndarray) -> None:
        """Have these from now on. Demands still go first, and find a slot even if it is that of a protected one.

        Args:
            protected: [N] bool; they leave when nothing else can.
            priority: [N] float32; what is above 0 is fetched while it is absent, larger first, in the slots of what is
                wanted less.
        """
        with self._lock:
            for stage in self._stages:
                stage.backoff.try_now()  # a plan comes seldom, and whoever made it waits
                stage.residents.order.protect(protected)
            self._priority = priority
            self._want()

    def expect(self, ahead: np.ndarray) -> None:
        """Fetch these before the others that are to be had. Args: ahead: [N] float32, larger first; 0: not before."""
        with self._lock:
            if ahead.any() or self._expected.any():
                self._expected = ahead
                self._want()

    def _want(self) -> None:
        most = np.float32(self._priority.max())
        priority = np.where(self._expected > 0, self._expected + most, self._priority)
        self._fast.want(priority, keeps_begun=True)
        if len(self._stages) > 1:
            absent = (priority > 0) & ~self._fast.residents.resident
            passing = np.where(absent, priority + priority.max(), priority)  # what is above already may leave below
            for stage in self._stages[1:]:
                stage.want(passing, keeps_begun=True)

    def absent(self, indices: Sequence[int]) -> list[int]:
        """Those that are not in the fast tier."""
        return [index for index in indices if self._fast.residents.slot_of(index) is None]

    @property
    def is_full(self) -> bool:
        """Whether every slot of the fast tier holds an expert that is wanted."""
        residents, priority = self._fast.residents, self._fast.priority
        return not residents.num_free and priority is not None and bool((priority[residents.resident] > 0).all())

    def wait(self, indices: Sequence[int], timeout_s: float, stopped: threading.Event) -> list[int]:
        """Wait until these are in the fast tier, or there is no room for the rest; those that are not there."""
        end_s = time.monotonic() + timeout_s
        while True:
            with self._lock:  # first: what is fetched meanwhile is seen by the second look
                is_over = self._is_over(indices)
            absent = self.absent(indices)
            if not absent or is_over or time.monotonic() > end_s or stopped.wait(_POLL_S):
                return absent

    def _is_over(self, indices: Sequence[int]) -> bool:
        """Whether nothing more comes: no room, or no luck. What only gave way to demands is begun again."""
        if self._has_no_room(indices):  # though what is expected may come and go without an end
            return True
        if not all(stage.queue.is_idle for stage in self._stages):
            return False
        failed = [index for stage in self._stages for index in stage.failed]
        if self.is_full or all(index in failed for index in self.absent(indices)):
            return True
        for stage in self._stages:
            stage.queue.wake()
        return False

    def _has_no_room(self, indices: Sequence[int]) -> bool:
        """Whether some are neither there nor on their way, and nothing that has a slot is to be had less than they.

        What is merely expected does not count: it passes, and may hold slots all the time.
        """
        residents = self._fast.residents
        queues = [stage.queue.transfers for stage in self._stages]
        waiting = [index for index in self.absent(indices) if not any(index in transfers for transfers in queues)]
        if residents.num_free or not waiting:
            return False
        return not (self._priority[~residents.absent] < self._priority[waiting].max()).any()

    def failure(self, index: int) -> str | None:
        """Why an expert could not be fetched since it was last asked for; None: it could, or was not."""
        with self._lock:
            errors = (stage.failed.get(index) for stage in self._stages)
            return next((error.message for error in errors if error is not None), None)

    def read(self, index: int, use: Callable[[memoryview], Result]) -> Result | None:
        """Look at an expert's bytes where they lie; None if it is not in the fast tier. It stays there meanwhile."""
        residents = self._fast.residents
        with self._lock:
            slot = residents.slot_of(index)
            if slot is None:
                return None
            residents.hold((index,))
        try:
            return use(self._fast.arena.view(slot)[: self._form.slot_bytes])
        finally:
            with self._lock:
                residents.release((index,))
