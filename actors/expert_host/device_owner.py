"""The third of a host's four classes: the one thread that computes. Takes batches from the pool, runs them, answers.

Knows tasks and the backend; knows no sockets.
"""

from __future__ import annotations

import logging
import threading
import time
from dataclasses import replace

import numpy as np
import torch

from actors.data_plane.frames import CombineFrame, DispatchFrame, RefusalReason
from actors.data_plane.task import DispatchTask
from actors.expert_host.batching_pool import BatchingPool
from actors.expert_host.handler import HostHandler
from actors.experts.backend import ExpertBackend
from cluster.errors import MoesaicError
from cluster.execution.batch_cost import BatchCost
from cluster.logs import log_event

_LOG = logging.getLogger(__name__)
_IDLE_POLL_S = 0.5


class DeviceOwner:
    """Runs until stopped. Changes to what it uses go through `call`, between two batches."""

    def __init__(
        self, handler: HostHandler, pool: BatchingPool, backend: ExpertBackend, costs: BatchCost | None = None
    ) -> None:
        """Args: costs: learns what batches cost that had their experts in memory."""
        self.busy_s = 0.0
        self.num_batches = 0
        self.num_refused = 0
        self._handler = handler
        self._pool = pool
        self._backend = backend
        self._costs = costs
        self._stall_s = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="device-owner", daemon=True)

    @property
    def is_running(self) -> bool:
        return self._thread.is_alive()

    def start(self) -> None:
        """Begin to compute."""
        self._thread.start()

    def stop(self) -> None:
        """End after the batch under way."""
        self._stop.set()
        self._handler.wake()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                self._turn()
        finally:  # whatever ended it: workers see it now and go elsewhere
            self._handler.close()
            for task in self._pool.drain():
                task.refuse(RefusalReason.FAILED, self._pool.epoch, "the host stops")

    def _turn(self) -> None:
        # Its own function: names that live on would keep the last task, and with it a worker's memory, while idle.
        for task in self._handler.poll(0.0 if len(self._pool) else _IDLE_POLL_S):
            self._add(task)
        batch = self._pool.take()
        if batch:
            self._compute(batch)

    def _add(self, task: DispatchTask) -> None:
        # The ids are copied before they are checked: a worker that breaks could still write to those it shares.
        frame = task.frame = replace(task.frame, expert_ids=task.frame.expert_ids.copy())
        try:
            self._backend.check(frame.layer, frame.rows.shape[1], frame.expert_ids)
        except MoesaicError as error:
            self.num_refused += 1
            task.refuse(RefusalReason.DAMAGED, self._pool.epoch, error.message)
            return
        self._pool.add(task)

    def _compute(self, batch: list[DispatchTask]) -> None:
        began, before = time.perf_counter(), self._backend.load_times()
        try:
            sums = self._partial_sums([task.frame for task in batch])
        except Exception as error:  # noqa: BLE001 - top loop: the batch's frames are refused, the host goes on
            log_event(_LOG, logging.ERROR, "batch failed", error=error)
            message = error.message if isinstance(error, MoesaicError) else repr(error)
            for task in batch:
                task.refuse(RefusalReason.FAILED, self._pool.epoch, message)
            return
        busy_s = time.perf_counter() - began
        self.busy_s += busy_s
        self.num_batches += 1
        now = self._backend.load_times()
        at = 0
        for task in batch:
            rows = len(task.frame.rows)
            task.reply(
                CombineFrame(
                    sequence=task.frame.sequence,
                    rows=sums[at : at + rows],
                    busy_us=int(busy_s * 1e6),
                    stall_us=int((now.stall_s - before.stall_s) * 1e6),
                    load_us=int(now.load_s * 1e6),
                    load_cpu_us=int(now.load_cpu_s * 1e6),
                )
            )
            at += rows
        if self._costs is not None:
            self._learn(self._costs, batch, busy_s)

    def _learn(self, costs: BatchCost, batch: list[DispatchTask], busy_s: float) -> None:
        stall_s = self._backend.store.counters.total_stall_s
        if stall_s == self._stall_s:  # else it waited for experts: that is not what they cost
            num_experts = self._backend.store.grid.num_experts
            rows_E = sum(np.bincount(task.frame.expert_ids.ravel(), minlength=num_experts + 1) for task in batch)
            rows_E = np.asarray(rows_E)[:num_experts]
            costs.observe(int(np.count_nonzero(rows_E)), int(rows_E.sum()), busy_s)
        self._stall_s = stall_s

    def _partial_sums(self, frames: list[DispatchFrame]) -> np.ndarray:
        first = frames[0]
        if len(frames) == 1:
            rows, ids, weights = first.rows, first.expert_ids, first.weights
        else:
            rows = np.concatenate([frame.rows for frame in frames])
            ids = np.concatenate([frame.expert_ids for frame in frames])
            weights = np.concatenate([frame.weights for frame in frames])
        x_TD = torch.from_numpy(rows)
        if rows.dtype == np.uint16:
            x_TD = x_TD.view(torch.bfloat16)
        sums = self._backend.partial_sums(first.layer, x_TD, torch.from_numpy(ids), torch.from_numpy(weights))
        return sums.numpy()
