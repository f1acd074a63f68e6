"""Carrier two: one bidirectional gRPC stream for each (worker, host), for hosts that share no memory with the worker.

The worker's engine is a plain thread, so the synchronous API is used: a reader thread hands answers to the engine.
Knows gRPC; its messages are made in grpc_messages.py.
"""

from __future__ import annotations

import hmac
import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from actors.data_plane.channel import CONNECT_TIMEOUT_S, Hello, HostEndpoint, HostLost, Welcome, remaining_s
from actors.data_plane.frames import MAX_FRAME_BYTES, Answer, DispatchFrame, FrameError, RefusalFrame, RefusalReason
from actors.data_plane.grpc_messages import (
    answer_message,
    dispatch_message,
    read_answer,
    read_dispatch,
    read_welcome,
    welcome_message,
)
from actors.host.batching_pool import DispatchTask
from cluster.rpc import expert_pb2 as pb
from cluster.rpc import expert_pb2_grpc

_SECRET_KEY = "moesaic-secret"
_OPTIONS = (
    ("grpc.max_receive_message_length", MAX_FRAME_BYTES),
    ("grpc.max_send_message_length", MAX_FRAME_BYTES),
    ("grpc.keepalive_time_ms", 2000),  # a peer that is cut off is noticed without traffic
    ("grpc.keepalive_timeout_ms", 4000),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
    ("grpc.http2.min_ping_interval_without_data_ms", 1000),
    ("grpc.http2.max_ping_strikes", 0),
    ("grpc.so_reuseport", 0),
    ("grpc.enable_http_proxy", 0),
)
_MAX_STREAMS = 64
_STOP_TIMEOUT_S = 5.0


class GrpcChannel:
    """A worker's side of one stream."""

    carrier = "grpc"

    def __init__(self, endpoint: HostEndpoint, *, worker_id: str, fingerprint: str) -> None:
        """Raises OSError if the host cannot be reached, MoesaicError if it refuses us."""
        self._outgoing: queue.SimpleQueue[pb.DispatchRequest | None] = queue.SimpleQueue()
        self._arrived: dict[int, Answer] = {}
        self._abandoned: set[int] = set()
        self._news = threading.Condition()
        self._ended: str | None = None
        self._sequence = 0
        self._host_id = endpoint.host_id
        self._channel = grpc.insecure_channel(endpoint.grpc_address, options=_OPTIONS)
        try:
            grpc.channel_ready_future(self._channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            self._channel.close()
            raise ConnectionError(f"{endpoint.grpc_address} does not answer") from error
        stub = expert_pb2_grpc.ExpertServiceStub(self._channel)
        self._outgoing.put(pb.DispatchRequest(hello=pb.WorkerHello(worker_id=worker_id, fingerprint=fingerprint)))
        metadata = ((_SECRET_KEY, endpoint.secret),)
        self._call: Any = stub.Dispatch(iter(self._outgoing.get, None), metadata=metadata)
        patience = threading.Timer(CONNECT_TIMEOUT_S, self._call.cancel)  # a stream's own timeout would end it later
        patience.start()
        try:
            self.welcome = read_welcome(next(self._call))
        except (grpc.RpcError, StopIteration, FrameError) as error:
            self.close()
            code, details = (error.code(), error.details()) if isinstance(error, grpc.Call) else (None, repr(error))
            if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
                raise HostLost(f"host {endpoint.host_id} refused this worker: {details}") from error
            raise ConnectionError(f"{endpoint.grpc_address}: {code} {details}") from error
        finally:
            patience.cancel()
        threading.Thread(target=self._read, name=f"host-{endpoint.host_id}", daemon=True).start()

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def send(self, frame: DispatchFrame) -> None:
        if self._ended is not None:
            raise HostLost(f"host {self._host_id}: {self._ended}")
        self._outgoing.put(pb.DispatchRequest(frame=dispatch_message(frame)))

    def receive(self, sequence: int, deadline_s: float) -> Answer:
        there = self.wait_for(sequence, deadline_s)
        with self._news:
            if sequence in self._arrived:
                return self._arrived.pop(sequence)
        self.close()
        raise HostLost(f"host {self._host_id}: {self._ended if there else 'no answer in time'}")

    def wait_for(self, sequence: int, deadline_s: float) -> bool:
        with self._news:
            return self._news.wait_for(
                lambda: sequence in self._arrived or self._ended is not None, remaining_s(deadline_s)
            )

    def abandon(self, sequence: int) -> None:
        with self._news:
            if self._arrived.pop(sequence, None) is None:
                self._abandoned.add(sequence)

    def settle(self) -> bool:
        with self._news:
            if self._ended is not None:
                raise HostLost(f"host {self._host_id}: {self._ended}")
            return not self._abandoned

    def close(self) -> None:
        self._outgoing.put(None)
        call = getattr(self, "_call", None)
        if call is not None:
            call.cancel()
        self._channel.close()

    def _read(self) -> None:
        reason = "the stream ended"
        try:
            for response in self._call:
                answer = read_answer(response)
                with self._news:
                    if answer.sequence in self._abandoned:
                        self._abandoned.discard(answer.sequence)
                    else:
                        self._arrived[answer.sequence] = answer
                    self._news.notify_all()
        except grpc.RpcError as error:
            reason = f"{error.code().name}: {error.details()}" if isinstance(error, grpc.Call) else str(error)
        except FrameError as error:
            reason = f"damaged answer: {error.message}"
        finally:
            with self._news:
                self._ended = reason
                self._news.notify_all()


class ExpertServer:
    """A host's side: serves streams and hands frames to `submit`."""

    def __init__(
        self,
        *,
        host: str,
        secret: str,
        welcome: Callable[[Hello], Welcome],
        submit: Callable[[DispatchTask], None],
    ) -> None:
        """Args: welcome: raises FrameError to refuse a worker. submit: may be called from any thread."""
        self._server = grpc.server(
            ThreadPoolExecutor(_MAX_STREAMS, thread_name_prefix="expert-stream"),
            options=_OPTIONS,
            maximum_concurrent_rpcs=_MAX_STREAMS,
        )
        self._servicer = _ExpertServicer(secret, welcome, submit)
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(self._servicer, self._server)
        port = self._server.add_insecure_port(f"{host}:0")
        self.address = f"{host}:{port}"

    @property
    def num_streams(self) -> int:
        return len(self._servicer.streams)

    def start(self) -> None:
        """Begin to serve."""
        self._server.start()

    def stop(self) -> None:
        """End all streams now: what they wait for will not be computed."""
        self._server.stop(grace=None).wait(timeout=_STOP_TIMEOUT_S)


class _ExpertServicer(expert_pb2_grpc.ExpertServiceServicer):
    def __init__(
        self, secret: str, welcome: Callable[[Hello], Welcome], submit: Callable[[DispatchTask], None]
    ) -> None:
        self.streams: set[object] = set()  # those welcomed
        self._secret = secret
        self._welcome = welcome
        self._submit = submit

    def Dispatch(
        self, request_iterator: Iterator[pb.DispatchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.DispatchResponse]:
        shown = dict(context.invocation_metadata()).get(_SECRET_KEY, "")
        if not hmac.compare_digest(str(shown).encode(), self._secret.encode()):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the worker does not know this host's secret")
        first = next(request_iterator, None)
        if first is None or first.WhichOneof("kind") != "hello":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
            return
        hello = Hello(secret="", worker_id=first.hello.worker_id, fingerprint=first.hello.fingerprint)
        try:
            welcome = self._welcome(hello)
        except FrameError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
            return
        answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self.streams.add(answers)
        try:
            yield pb.DispatchResponse(welcome=welcome_message(welcome))
            threading.Thread(target=self._take_frames, args=(request_iterator, answers), daemon=True).start()
            while (answer := answers.get()) is not None:
                yield answer_message(answer)
        finally:
            self.streams.discard(answers)

    def _take_frames(self, requests: Iterator[pb.DispatchRequest], answers: queue.SimpleQueue[Answer | None]) -> None:
        try:
            for request in requests:
                try:
                    self._submit(DispatchTask(read_dispatch(request.frame), answers.put))
                except FrameError as error:
                    answers.put(_refused(request.frame.sequence, error.message))
        except grpc.RpcError:  # the worker has gone
            return
        finally:
            answers.put(None)  # who waits for answers ends


def _refused(sequence: int, message: str) -> RefusalFrame:
    return RefusalFrame(sequence=sequence, reason=RefusalReason.DAMAGED, epoch=0, message=message)
