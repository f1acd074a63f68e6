"""A real expert host, except for its experts: expert e of layer l multiplies a row by l * 100 + e + 1.

Sockets, frames, pool and device owner are the real ones, in threads of the test's process.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Hashable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from actors.data_plane.channel import ExpertChannel, Hello, HostEndpoint, Welcome
from actors.data_plane.connect import Carrier, Connector
from actors.data_plane.frames import Answer, DispatchFrame, FrameError, decode_dispatch, encode_answer
from actors.data_plane.grpc_stream import ExpertServer
from actors.data_plane.task import DispatchTask
from actors.expert_host.batching_pool import BatchingPool
from actors.expert_host.device_owner import DeviceOwner
from actors.expert_host.handler import HostHandler
from actors.experts.backend import ExpertBackend, LoadTimes
from cluster.errors import MoesaicError

DIM, NUM_EXPERTS, TOP_K, LAYERS, MAX_ROWS = 16, 8, 2, (0, 3), 64
SECRET, FINGERPRINT = "secret of the host", "model"


class ScaleBackend(ExpertBackend):
    """Has an ExpertBackend's checks; `gate` holds every batch back while it is cleared."""

    def __init__(self) -> None:
        layout: Any = SimpleNamespace(layers=LAYERS, hidden=DIM, num_experts=NUM_EXPERTS)
        super().__init__(SimpleNamespace(layout=layout), None)  # type: ignore[arg-type]
        self.batches: list[tuple[int, int]] = []  # layer and rows of each
        self.gate = threading.Event()
        self.gate.set()
        self.at_gate = threading.Event()
        self.fail: MoesaicError | None = None

    def load_times(self) -> LoadTimes:
        return LoadTimes(0.0, 0.0, 0.0)

    def partial_sums(
        self, layer: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, dtype: torch.dtype = torch.float32
    ) -> Tensor:
        self.at_gate.set()
        assert self.gate.wait(30)
        self.batches.append((layer, len(x_TD)))
        if self.fail is not None:
            raise self.fail
        scale_TK = torch.where(ids_TK == NUM_EXPERTS, 0.0, weights_TK * (layer * 100 + ids_TK + 1))
        return (scale_TK.sum(1, keepdim=True) * x_TD.float()).to(dtype)


def expected_sums(frame: DispatchFrame) -> np.ndarray:
    """[T, D] float32: what a host answers to float32 rows."""
    factor = (frame.layer * 100 + frame.expert_ids + 1).astype(np.float32)
    scale = np.where(frame.expert_ids == NUM_EXPERTS, np.float32(0.0), frame.weights * factor)
    return scale.sum(1, keepdims=True, dtype=np.float32) * frame.rows


class Outlooks:
    """Remembers what workers said, and which of them have gone."""

    def __init__(self) -> None:
        self.said: list[tuple[Hashable, bytes]] = []
        self.gone: list[Hashable] = []

    def hear(self, worker: Hashable, data: bytes) -> None:
        self.said.append((worker, data))

    def forget(self, worker: Hashable) -> None:
        self.gone.append(worker)


@dataclass(slots=True)
class FakeHost:
    """The parts of a running host."""

    endpoint: HostEndpoint
    handler: HostHandler
    pool: BatchingPool
    owner: DeviceOwner
    server: ExpertServer
    backend: ScaleBackend
    welcome: Callable[[Hello], Welcome]
    submitted: list[DispatchTask]  # by threads of gRPC streams
    outlooks: Outlooks

    def stop(self) -> None:
        """As ExpertHost.stop."""
        self.backend.gate.set()
        self.server.stop()
        self.owner.stop()


@contextmanager
def running_host(*, checked: bool = False, max_rows: int = MAX_ROWS) -> Iterator[FakeHost]:
    """A host that owns all experts at plan epoch 1."""
    pool, backend = BatchingPool(max_rows=max_rows), ScaleBackend()

    def welcome(hello: Hello) -> Welcome:
        if hello.fingerprint != FINGERPRINT:
            raise FrameError(f"this host serves model {FINGERPRINT}, the worker {hello.fingerprint}")
        owned = dict.fromkeys(LAYERS, tuple(range(NUM_EXPERTS)))
        return Welcome(host_id="host", epoch=pool.epoch, num_experts=NUM_EXPERTS, owned=owned)

    submitted: list[DispatchTask] = []

    def submit(task: DispatchTask) -> None:
        handler.submit(task)
        submitted.append(task)

    outlooks = Outlooks()
    handler = HostHandler(welcome, outlooks, secret=SECRET, checked=checked)
    server = ExpertServer(
        host="127.0.0.1", secret=SECRET, welcome=welcome, submit=submit, outlooks=outlooks, checked=checked
    )
    endpoint = HostEndpoint(host_id="host", socket_name=handler.socket_name, grpc_address=server.address, secret=SECRET)
    owner = DeviceOwner(handler, pool, backend)
    host = FakeHost(endpoint, handler, pool, owner, server, backend, welcome, submitted, outlooks)
    server.start()
    host.owner.start()
    try:
        yield host
    finally:
        host.stop()


def connect(
    carrier: Carrier, endpoint: HostEndpoint, *, fingerprint: str = FINGERPRINT, checked: bool = False, dim: int = DIM
) -> ExpertChannel:
    """A worker's channel."""
    connector = Connector(
        carrier, worker_id="w", fingerprint=fingerprint, max_rows=MAX_ROWS, dim=dim, top_k=TOP_K, checked=checked
    )
    return connector.connect(endpoint)


def make_frame(channel: ExpertChannel, num_rows: int = 3, *, seed: int = 0, **changes: Any) -> DispatchFrame:
    """A frame of random rows for `channel`, with the next sequence."""
    generator = np.random.default_rng(seed)
    values: dict[str, Any] = {
        "sequence": channel.next_sequence(),
        "epoch": channel.welcome.epoch,
        "step": 1,
        "layer": LAYERS[-1],
        "micro_batch": 0,
        "deadline_us": 10_000_000,
        "rows": generator.standard_normal((num_rows, DIM), dtype=np.float32),
        "expert_ids": generator.integers(0, NUM_EXPERTS + 1, (num_rows, TOP_K)),
        "weights": generator.random((num_rows, TOP_K), dtype=np.float32),
    }
    return DispatchFrame(**(values | changes))


def soon(seconds: float = 10.0) -> float:
    """A deadline on the monotonic clock."""
    return time.monotonic() + seconds


def wait_until(claim: Callable[[], bool], what: str, deadline_s: float = 10.0) -> None:
    """Poll; fails if it does not become true in time."""
    end_s = soon(deadline_s)
    while not claim():
        assert time.monotonic() < end_s, what
        time.sleep(0.01)


class ActorHost:
    """What ActorCallChannel calls, as ExpertHost answers it."""

    def __init__(self) -> None:
        self._running = running_host()
        self._host = self._running.__enter__()

    def welcome_json(self, worker_id: str, fingerprint: str) -> dict[str, Any]:
        try:
            return self._host.welcome(Hello(worker_id=worker_id, fingerprint=fingerprint)).to_json()
        except FrameError as error:
            return {"refused": error.message}

    def dispatch(self, data: bytes) -> bytes:
        answered: Future[Answer] = Future()
        frame = decode_dispatch(memoryview(bytearray(data)))
        self._host.handler.submit(DispatchTask(frame, answered.set_result))
        buffer = bytearray(2**20)
        return bytes(buffer[: encode_answer(answered.result(30), memoryview(buffer), checked=True)])
