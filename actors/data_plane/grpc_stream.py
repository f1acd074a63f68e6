"""Carrier two: one bidirectional gRPC stream for each (worker, host), for hosts that share no memory with the worker.

The worker's engine is a plain thread, so the synchronous API is used: a reader thread hands answers to the engine.
Knows gRPC; its messages are made in grpc_messages.py.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import grpc

from actors.data_plane.channel import (
    CONNECT_TIMEOUT_S,
    Hello,
    HostEndpoint,
    HostLost,
    OutlookSink,
    StreamLimits,
    Welcome,
    remaining_s,
)
from actors.data_plane.frames import Answer, DispatchFrame, FrameError, RefusalFrame, RefusalReason
from actors.data_plane.grpc_messages import (
    answer_message,
    dispatch_message,
    read_answer,
    read_challenge,
    read_dispatch,
    read_welcome,
    welcome_message,
)
from actors.data_plane.task import DispatchTask
from cluster.network.addresses import join_address
from cluster.network.handshake import Handshake, new_nonce
from cluster.rpc import expert_pb2 as pb
from cluster.rpc import expert_pb2_grpc

_MAX_UNREAD = 256  # answers that a worker leaves unread: far more than it ever has frames under way
_MAX_UNSENT = 64  # messages that wait for the network; an outlook that comes late is worth nothing
_STOP_TIMEOUT_S = 5.0
_DEFAULT_LIMITS = StreamLimits()


def _options(limits: StreamLimits) -> tuple[tuple[str, int], ...]:
    return (
        ("grpc.max_receive_message_length", limits.max_bytes),
        ("grpc.max_send_message_length", limits.max_bytes),
        ("grpc.max_concurrent_streams", limits.max_streams),  # of one connection: a worker has one stream
        ("grpc.keepalive_time_ms", int(limits.keepalive_s * 1000)),  # a peer that is cut off is noticed without traffic
        ("grpc.keepalive_timeout_ms", int(limits.keepalive_s * 2000)),
        ("grpc.keepalive_permit_without_calls", 1),
        ("grpc.http2.max_pings_without_data", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", int(limits.keepalive_s * 500)),
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.so_reuseport", 0),
        ("grpc.enable_http_proxy", 0),
    )


class GrpcChannel:
    """A worker's side of one stream."""

    carrier = "grpc"

    def __init__(
        self,
        endpoint: HostEndpoint,
        *,
        worker_id: str,
        fingerprint: str,
        checked: bool = False,
        limits: StreamLimits = _DEFAULT_LIMITS,
    ) -> None:
        """Raises OSError if the host cannot be reached, MoesaicError if it refuses us."""
        self._checked = checked
        self._outgoing: queue.SimpleQueue[pb.DispatchRequest | None] = queue.SimpleQueue()
        self._arrived: dict[int, Answer] = {}
        self._abandoned: set[int] = set()
        self._news = threading.Condition()
        self._ended: str | None = None
        self._sequence = 0
        self._host_id = endpoint.host_id
        self._channel = grpc.insecure_channel(endpoint.grpc_address, options=_options(limits))
        try:
            grpc.channel_ready_future(self._channel).result(timeout=CONNECT_TIMEOUT_S)
        except grpc.FutureTimeoutError as error:
            self._channel.close()
            raise ConnectionError(f"{endpoint.grpc_address} does not answer") from error
        stub = expert_pb2_grpc.ExpertServiceStub(self._channel)
        self._call: Any = stub.Dispatch(iter(self._outgoing.get, None))
        patience = threading.Timer(CONNECT_TIMEOUT_S, self._call.cancel)  # a stream's own timeout would end it later
        patience.start()
        try:
            self.welcome = self._greet(endpoint.secret, worker_id, fingerprint)
        except (grpc.RpcError, StopIteration, FrameError) as error:
            self.close()
            code, details = (error.code(), error.details()) if isinstance(error, grpc.Call) else (None, repr(error))
            if code in (grpc.StatusCode.FAILED_PRECONDITION, grpc.StatusCode.UNAUTHENTICATED):
                raise HostLost(f"host {endpoint.host_id} refused this worker: {details}") from error
            raise ConnectionError(f"{endpoint.grpc_address}: {code} {details}") from error
        finally:
            patience.cancel()
        threading.Thread(target=self._read, name=f"host-{endpoint.host_id}", daemon=True).start()

    def _greet(self, secret: str, worker_id: str, fingerprint: str) -> Welcome:
        """Prove who we are, and have the host prove the same. Raises FrameError if it does not."""
        theirs, nonce = read_challenge(next(self._call)), new_nonce()
        handshake = Handshake(purpose="grpc", listener_nonce=theirs, connector_nonce=nonce)
        proof = handshake.proof(secret, "connector")
        hello = pb.WorkerHello(worker_id=worker_id, fingerprint=fingerprint, nonce=nonce, proof=proof)
        self._outgoing.put(pb.DispatchRequest(hello=hello))
        welcome, shown = read_welcome(next(self._call))
        if not handshake.is_proven(shown, secret, "listener"):
            raise FrameError("who answers there does not know the host's secret")
        return welcome

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def send(self, frame: DispatchFrame) -> None:
        if self._ended is not None:
            raise HostLost(f"host {self._host_id}: {self._ended}")
        self._outgoing.put(pb.DispatchRequest(frame=dispatch_message(frame, checked=self._checked)))

    def send_outlook(self, data: bytes) -> None:
        if self._ended is None and self._outgoing.qsize() < _MAX_UNSENT:
            self._outgoing.put(pb.DispatchRequest(outlook=data))

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
        outlooks: OutlookSink,
        checked: bool = False,
        limits: StreamLimits = _DEFAULT_LIMITS,
    ) -> None:
        """Args: welcome: raises FrameError to refuse a worker. submit: may be called from any thread. outlooks: hears
        what workers expect. checked: answers carry a checksum."""
        self._server = grpc.server(
            ThreadPoolExecutor(limits.max_streams, thread_name_prefix="expert-stream"),
            options=_options(limits),
            maximum_concurrent_rpcs=limits.max_streams,
        )
        self._servicer = _ExpertServicer(secret, welcome, submit, outlooks, checked=checked)
        expert_pb2_grpc.add_ExpertServiceServicer_to_server(self._servicer, self._server)
        port = self._server.add_insecure_port(join_address(host, 0))
        self.address = join_address(host, port)

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
        self,
        secret: str,
        welcome: Callable[[Hello], Welcome],
        submit: Callable[[DispatchTask], None],
        outlooks: OutlookSink,
        *,
        checked: bool,
    ) -> None:
        self.streams: set[object] = set()  # those welcomed
        self._checked = checked
        self._secret = secret
        self._welcome = welcome
        self._submit = submit
        self._outlooks = outlooks

    def Dispatch(
        self, request_iterator: Iterator[pb.DispatchRequest], context: grpc.ServicerContext
    ) -> Iterator[pb.DispatchResponse]:
        nonce = new_nonce()
        patience = threading.Timer(CONNECT_TIMEOUT_S, context.cancel)  # a stranger must not keep a thread
        patience.start()
        try:
            yield pb.DispatchResponse(challenge=pb.HostChallenge(nonce=nonce))
            first = next(request_iterator, None)
        finally:
            patience.cancel()
        if first is None or first.WhichOneof("kind") != "hello":
            context.abort(grpc.StatusCode.INVALID_ARGUMENT, "the first message must be a hello")
            return
        handshake = Handshake(purpose="grpc", listener_nonce=nonce, connector_nonce=first.hello.nonce)
        if not handshake.is_proven(first.hello.proof, self._secret, "connector"):
            context.abort(grpc.StatusCode.UNAUTHENTICATED, "the worker does not know this host's secret")
        try:
            welcome = self._welcome(Hello(worker_id=first.hello.worker_id, fingerprint=first.hello.fingerprint))
        except FrameError as error:
            context.abort(grpc.StatusCode.FAILED_PRECONDITION, error.message)
            return
        answers: queue.SimpleQueue[Answer | None] = queue.SimpleQueue()
        self.streams.add(answers)
        try:
            yield welcome_message(welcome, handshake.proof(self._secret, "listener"))
            threading.Thread(target=self._take_frames, args=(request_iterator, answers, nonce), daemon=True).start()
            while (answer := answers.get()) is not None:
                if answers.qsize() > _MAX_UNREAD:
                    context.abort(grpc.StatusCode.RESOURCE_EXHAUSTED, f"{_MAX_UNREAD} answers wait unread")
                yield answer_message(answer, checked=self._checked)
        finally:
            self.streams.discard(answers)

    def _take_frames(
        self, requests: Iterator[pb.DispatchRequest], answers: queue.SimpleQueue[Answer | None], worker: bytes
    ) -> None:
        try:
            for request in requests:
                if request.WhichOneof("kind") == "outlook":
                    self._outlooks.hear(worker, request.outlook)
                    continue
                try:
                    self._submit(DispatchTask(read_dispatch(request.frame), answers.put))
                except FrameError as error:
                    answers.put(_refused(request.frame.sequence, error.message))
        except grpc.RpcError:  # the worker has gone
            return
        finally:
            self._outlooks.forget(worker)
            answers.put(None)  # who waits for answers ends


def _refused(sequence: int, message: str) -> RefusalFrame:
    return RefusalFrame(sequence=sequence, reason=RefusalReason.DAMAGED, epoch=0, message=message)
