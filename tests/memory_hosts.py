"""Expert hosts in memory with scripted failures, and a worker's dispatcher over them: no sockets, no threads."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from expert_builders import ExpertFile, open_store
from torch import Tensor

from actors.data_plane.channel import ExpertChannel, HostEndpoint, HostLost, Welcome
from actors.data_plane.frames import Answer, CombineFrame, DispatchFrame, RefusalFrame, RefusalReason
from actors.expert_client.dispatch import HostDispatcher
from actors.expert_client.host_connections import HostConnections
from actors.expert_client.local_memory import LocalMemory
from actors.experts.backend import ExpertBackend
from actors.experts.compute import ExpertCompute
from actors.gates.activation_recorder import ActivationRecorder
from cluster.errors import ExpertReadError

NUM_EXPERTS, TOP_K, LAYER = 6, 3, 1
FAULTS = ("ok", "send", "receive", "failed", "stale", "shape", "slow", "late")


@dataclass
class Host:
    """An expert host in memory. `faults` are what happens to the next frames; then all goes well."""

    index: int
    owned: set[int]
    backend: ExpertBackend
    faults: deque[str] = field(default_factory=deque)
    epoch: int = 1
    received: list[DispatchFrame] = field(default_factory=list)
    computed: list[DispatchFrame] = field(default_factory=list)
    outlooks: list[bytes] = field(default_factory=list)
    is_slow: bool = False  # what it is slow with does not come yet


class MemoryChannel:
    """A connection to a Host."""

    carrier = "memory"

    def __init__(self, host: Host) -> None:
        self.welcome = Welcome(
            host_id=f"host-{host.index}",
            epoch=host.epoch,
            num_experts=NUM_EXPERTS,
            owned={layer: tuple(sorted(host.owned)) for layer in (0, 1)},
        )
        self.waiting: dict[int, tuple[DispatchFrame, str]] = {}
        self.abandoned: set[int] = set()
        self._host = host
        self._sequence = 0
        self._closed = False

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def send(self, frame: DispatchFrame) -> None:
        self._host.received.append(frame)
        fault = self._host.faults.popleft() if self._host.faults else "ok"
        if self._closed or fault == "send":
            raise HostLost("the connection is gone")
        self.waiting[frame.sequence] = (frame, fault)

    def receive(self, sequence: int, deadline_s: float) -> Answer:
        frame, fault = self.waiting.pop(sequence)
        if self._closed or fault == "receive":
            raise HostLost("no answer in time")
        if fault == "stale":
            self._host.epoch += 1
        if frame.epoch != self._host.epoch:
            return self._refusal(sequence, RefusalReason.STALE_EPOCH)
        if fault == "late":
            return self._refusal(sequence, RefusalReason.LATE)
        if fault == "failed":
            return self._refusal(sequence, RefusalReason.FAILED)
        ids, weights = torch.from_numpy(frame.expert_ids), torch.from_numpy(frame.weights)
        sums = self._host.backend.partial_sums(frame.layer, torch.from_numpy(frame.rows), ids, weights)
        rows = sums.numpy()
        if fault == "shape":
            return CombineFrame(sequence=sequence, rows=rows[:, 1:], busy_us=1)
        self._host.computed.append(frame)
        return CombineFrame(sequence=sequence, rows=rows, busy_us=1)

    def wait_for(self, sequence: int, deadline_s: float) -> bool:
        return sequence not in self.waiting or self.waiting[sequence][1] != "slow"

    def send_outlook(self, data: bytes) -> None:
        self._host.outlooks.append(data)

    def abandon(self, sequence: int) -> None:
        self.abandoned.add(sequence)

    def settle(self) -> bool:
        if self._closed:
            raise HostLost("the connection is gone")
        if not self._host.is_slow:
            for sequence in self.abandoned:
                del self.waiting[sequence]
            self.abandoned.clear()
        return not self.abandoned

    def close(self) -> None:
        self._closed = True

    def _refusal(self, sequence: int, reason: RefusalReason) -> RefusalFrame:
        return RefusalFrame(sequence=sequence, reason=reason, epoch=self._host.epoch, message=reason.name)


class InlineLinks(HostConnections):
    """HostConnections without its thread: connects at once if `reconnects`, else never again."""

    def __init__(self, hosts: Sequence[Host], *, reconnects: bool) -> None:
        self.reconnects = True
        self.now_s = 0.0
        self.hosts = hosts

        def connect(endpoint: HostEndpoint) -> ExpertChannel:
            if not self.reconnects:
                raise ConnectionError("gone")
            return MemoryChannel(self.hosts[int(endpoint.host_id)])

        def locate(index: int) -> HostEndpoint:
            return HostEndpoint(host_id=str(index), socket_name="", grpc_address="", secret="")

        super().__init__(len(hosts), locate, connect, layers=(0, 1), num_experts=NUM_EXPERTS, clock=lambda: self.now_s)
        self.connect_due()
        self.reconnects = reconnects

    def lose(self, channel: ExpertChannel, reason: str) -> None:
        super().lose(channel, reason)
        self.now_s += 100.0  # any back-off is over
        self.connect_due()

    def renew(self, channel: ExpertChannel, timeout_s: float) -> bool:
        super().renew(channel, 0.0)
        self.connect_due()
        return True


class CountingBackend(ExpertBackend):
    """Notes what is computed on the worker."""

    def __init__(self, store: object, compute: ExpertCompute) -> None:
        super().__init__(store, compute)  # type: ignore[arg-type]
        self.computed: list[np.ndarray] = []
        self.error: ExpertReadError | None = None

    def partial_sums(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        if self.error is not None:
            raise self.error
        self.computed.append(ids_TK.numpy().copy())
        return super().partial_sums(layer, x_TD, ids_TK, weights_TK, dtype)


class Worker:
    """A HostDispatcher with all its parts at hand."""

    def __init__(
        self,
        file: ExpertFile,
        compute: ExpertCompute,
        hosts: Sequence[Host],
        *,
        slots: int = 0,
        resident: Sequence[int] = (),
        reconnects: bool = True,
    ) -> None:
        self.hosts = hosts
        self.links = InlineLinks(hosts, reconnects=reconnects)
        recorder = ActivationRecorder((0, 1), NUM_EXPERTS, None)
        self.fallbacks: list[CountingBackend] = []
        self.backend = CountingBackend(open_store(file, slots=slots, min_experts=TOP_K), compute) if slots else None
        if self.backend is not None:
            list(self.backend.store.acquire(LAYER, list(resident)[:slots]))

        def fallback() -> ExpertBackend:
            self.fallbacks.append(CountingBackend(open_store(file, slots=TOP_K, min_experts=TOP_K), compute))
            return self.fallbacks[-1]

        self.local = LocalMemory(self.backend, fallback, recorder, clock=lambda: self.links.now_s)
        self.dispatcher = HostDispatcher(self.links, self.local, recorder, num_experts=NUM_EXPERTS, timeout_s=1.0)

    def choices(self) -> list[int]:
        """Experts of all choices computed so far, here or there."""
        here = [ids for backend in filter(None, [self.backend, *self.fallbacks]) for ids in backend.computed]
        there = [frame.expert_ids for host in self.hosts for frame in host.computed]
        flat = np.concatenate([ids.reshape(-1) for ids in (*here, *there)] or [np.zeros(0, np.int64)])
        return sorted(flat[flat != NUM_EXPERTS].tolist())

    def nothing_waits(self) -> bool:
        return not any(channel.waiting for channel in self.links.routes.channels)  # type: ignore[attr-defined]
