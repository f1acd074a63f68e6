"""All of an expert host but its experts: it answers with the rows that it got."""

from __future__ import annotations

import secrets
from concurrent.futures import Future
from typing import Any

import torch

from actors.data_plane.channel import Hello, HostEndpoint, Welcome
from actors.data_plane.frames import Answer, combine_bytes, decode_dispatch, encode_answer
from actors.experts.backend import LoadTimes


class _Echo:
    """A backend that answers with the rows it was given."""

    def check(self, layer: int, x_TD: torch.Tensor, ids_TK: torch.Tensor) -> None:
        """Everything is fine."""

    def load_times(self) -> LoadTimes:
        """Nothing is loaded."""
        return LoadTimes(0.0, 0.0, 0.0)

    def partial_sums(self, layer: int, x_TD: torch.Tensor, ids_TK: object, weights_TK: object) -> torch.Tensor:
        """The rows."""
        return x_TD


class EchoHost:
    """All of an expert host but its experts; a Ray actor, so that the actor call reaches it too."""

    def __init__(self) -> None:
        from actors.data_plane.grpc_stream import ExpertServer
        from actors.expert_host.batching_pool import BatchingPool
        from actors.expert_host.device_owner import DeviceOwner
        from actors.expert_host.handler import HostHandler
        from actors.expert_host.outlooks import HostOutlooks

        torch.set_num_threads(1)
        self._secret = secrets.token_hex(8)
        outlooks = HostOutlooks()  # never started: nobody listens
        self._handler = HostHandler(self._welcome, outlooks, secret=self._secret)
        backend: Any = _Echo()
        self._owner = DeviceOwner(self._handler, BatchingPool(max_rows=4096), backend)
        self._server = ExpertServer(
            host="127.0.0.1",
            secret=self._secret,
            welcome=self._welcome,
            submit=self._handler.submit,
            outlooks=outlooks,
        )
        self._server.start()
        self._owner.start()

    def endpoint(self) -> HostEndpoint:
        """Where it listens."""
        return HostEndpoint(
            host_id="echo",
            socket_name=self._handler.socket_name,
            grpc_address=self._server.address,
            secret=self._secret,
        )

    def welcome_json(self, worker_id: str, fingerprint: str) -> dict[str, object]:
        """Handshake of the actor call."""
        return self._welcome(Hello(worker_id=worker_id, fingerprint=fingerprint)).to_json()

    def dispatch(self, data: bytes) -> bytes:
        """One frame of the actor call."""
        from actors.data_plane.task import DispatchTask

        answered: Future[Answer] = Future()
        frame = decode_dispatch(memoryview(bytearray(data)))
        self._handler.submit(DispatchTask(frame, answered.set_result))
        buffer = bytearray(combine_bytes(*frame.rows.shape))
        return bytes(buffer[: encode_answer(answered.result(), memoryview(buffer))])

    def _welcome(self, hello: Hello) -> Welcome:
        return Welcome(host_id="echo", epoch=1, num_experts=1, owned={0: (0,)})
