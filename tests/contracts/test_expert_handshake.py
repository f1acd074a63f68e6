"""Who may connect to an expert host and how, by every carrier; the host is real but for its experts."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import grpc
import numpy as np
import pytest
from fake_host import NUM_EXPERTS, SECRET, FakeHost, connect, expected_sums, make_frame, running_host, soon, wait_until

from actors.data_plane.channel import ExpertChannel, HostLost
from actors.data_plane.connect import Carrier
from actors.data_plane.frames import CombineFrame
from actors.data_plane.grpc_stream import ExpertServer
from cluster.network.handshake import NONCE_BYTES, Handshake, new_nonce
from cluster.rpc import expert_pb2_grpc


@pytest.fixture(params=["shared_memory", "grpc"])
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return request.param


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with running_host() as running:
        yield running


def _answers_right(channel: ExpertChannel) -> bool:
    frame = make_frame(channel)
    channel.send(frame)
    answer = channel.receive(frame.sequence, soon())
    return isinstance(answer, CombineFrame) and np.array_equal(answer.rows, expected_sums(frame))


def test_welcome_says_who_the_host_is_and_what_it_owns(host: FakeHost, carrier: Carrier) -> None:
    with contextlib.closing(connect(carrier, host.endpoint)) as channel:
        welcome = channel.welcome
    assert (welcome.host_id, welcome.epoch, welcome.num_experts) == ("host", 1, NUM_EXPERTS)
    assert welcome.owned == {0: tuple(range(NUM_EXPERTS)), 3: tuple(range(NUM_EXPERTS))}
    assert channel.carrier.replace(" ", "_") == carrier


def test_wrong_secret_is_refused_with_the_reason(host: FakeHost, carrier: Carrier) -> None:
    for secret in ("wrong", "", "geheim\u00e4"):
        with pytest.raises(HostLost, match="does not know this host's secret"):
            connect(carrier, replace(host.endpoint, secret=secret))
    with contextlib.closing(connect(carrier, host.endpoint)) as channel:
        assert _answers_right(channel)


def test_another_model_is_refused_with_both_names(host: FakeHost, carrier: Carrier) -> None:
    with pytest.raises(HostLost, match=r"serves model model, the worker other"):
        connect(carrier, host.endpoint, fingerprint="other")
    assert host.handler.num_connections + host.server.num_streams == 0


def test_auto_takes_shared_memory_where_there_is_and_grpc_where_not(host: FakeHost) -> None:
    assert connect("auto", host.endpoint).carrier == "shared memory"
    elsewhere = replace(host.endpoint, socket_name="moesaic-of-another-machine")
    assert connect("auto", elsewhere).carrier == "grpc"
    with pytest.raises(OSError):
        connect("shared_memory", elsewhere)


def test_host_that_is_not_there_is_an_os_error(host: FakeHost, carrier: Carrier, monkeypatch: Any) -> None:
    monkeypatch.setattr("actors.data_plane.grpc_stream.CONNECT_TIMEOUT_S", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as unused:
        port = unused.getsockname()[1]
    with pytest.raises(OSError):
        connect(carrier, replace(host.endpoint, socket_name="moesaic-nobody", grpc_address=f"127.0.0.1:{port}"))


def test_something_else_that_listens_there_is_an_os_error_in_bounded_time(
    host: FakeHost, carrier: Carrier, monkeypatch: Any
) -> None:
    """It takes the connection and never says a word."""
    monkeypatch.setattr("actors.data_plane.grpc_stream.CONNECT_TIMEOUT_S", 0.3)
    monkeypatch.setattr("actors.data_plane.shared_memory.CONNECT_TIMEOUT_S", 0.3)
    name = "moesaic-test-silent"
    with (
        socket.create_server(("127.0.0.1", 0)) as tcp,
        socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as unix,
    ):
        unix.bind("\0" + name)
        unix.listen()
        address = f"127.0.0.1:{tcp.getsockname()[1]}"
        began = time.monotonic()
        with pytest.raises(OSError):
            connect(carrier, replace(host.endpoint, socket_name=name, grpc_address=address))
        assert time.monotonic() - began < 5


def test_connections_are_counted_and_end_with_the_worker(host: FakeHost, carrier: Carrier) -> None:
    channels = [connect(carrier, host.endpoint) for _ in range(3)]
    wait_until(lambda: host.handler.num_connections + host.server.num_streams == 3, "three connections")
    before = threading.active_count()
    for channel in channels:
        channel.close()
        channel.close()
    wait_until(lambda: host.handler.num_connections + host.server.num_streams == 0, "no connections")
    if carrier == "grpc":
        wait_until(lambda: threading.active_count() <= before - 3, "its threads end")


class Tap:
    """Between a worker and a host: hears everything, and can speak for the host."""

    def __init__(self, listener: socket.socket, connect_on: Any, *, speaks: bytes | None = None) -> None:
        self.heard = bytearray()
        self._listener, self._connect_on, self._speaks = listener, connect_on, speaks
        threading.Thread(target=self._run, daemon=True).start()

    def _run(self) -> None:
        with contextlib.suppress(OSError):
            worker, _ = self._listener.accept()
            if self._speaks is not None:
                worker.send(self._speaks)
                self.heard += worker.recv(2**16)
                worker.send(b'{"host_id": "host", "epoch": 1, "num_experts": 8, "owned": {}, "nonce": "", "proof": ""}')
                return
            host = self._connect_on()
            threading.Thread(target=self._copy, args=(host, worker), daemon=True).start()
            self._copy(worker, host)

    def _copy(self, source: socket.socket, target: socket.socket) -> None:
        with contextlib.suppress(OSError):
            while data := source.recv(2**16):
                self.heard += data
                target.sendall(data)


def test_secret_does_not_cross_the_network(host: FakeHost) -> None:
    port = int(host.endpoint.grpc_address.rpartition(":")[2])
    with socket.create_server(("127.0.0.1", 0)) as listener:
        tap = Tap(listener, lambda: socket.create_connection(("127.0.0.1", port)))
        address = f"127.0.0.1:{listener.getsockname()[1]}"
        with contextlib.closing(connect("grpc", replace(host.endpoint, grpc_address=address))) as channel:
            assert _answers_right(channel)
    assert len(tap.heard) > 500
    assert SECRET.encode() not in tap.heard
    assert SECRET.encode().hex().encode() not in tap.heard


def test_host_that_does_not_know_the_secret_gets_neither_it_nor_any_rows(host: FakeHost) -> None:
    name = "moesaic-test-forged"
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as unix:
        unix.bind("\0" + name)
        unix.listen()
        tap = Tap(unix, None, speaks=bytes(NONCE_BYTES))
        with pytest.raises(OSError, match="does not know the host's secret"):
            connect("shared_memory", replace(host.endpoint, socket_name=name))
    assert SECRET.encode() not in tap.heard


def test_grpc_host_that_does_not_know_the_secret_is_left_at_once(host: FakeHost) -> None:
    forger = ExpertServer(
        host="127.0.0.1", secret="a guess", welcome=host.welcome, submit=host.handler.submit, outlooks=host.outlooks
    )
    forger.start()
    try:
        with pytest.raises(HostLost):  # it refuses the proof that it cannot check
            connect("grpc", replace(host.endpoint, grpc_address=forger.address))
    finally:
        forger.stop()


def test_proof_is_worth_nothing_elsewhere() -> None:
    """Overheard and said again: to the same host, in the other direction, or at its other port."""
    ours = Handshake(purpose="grpc", listener_nonce=new_nonce(), connector_nonce=new_nonce())
    proof = ours.proof(SECRET, "connector")
    assert ours.is_proven(proof, SECRET, "connector")
    assert not ours.is_proven(proof, SECRET, "listener")
    assert not ours.is_proven(proof, "guess", "connector")
    assert not ours.is_proven(b"", SECRET, "connector")
    for other in (
        replace(ours, listener_nonce=new_nonce()),
        replace(ours, purpose="shared memory"),
        replace(ours, listener_nonce=ours.connector_nonce, connector_nonce=ours.listener_nonce),
        replace(ours, listener_nonce=ours.listener_nonce + ours.connector_nonce, connector_nonce=b""),
    ):
        assert not other.is_proven(proof, SECRET, "connector")


def test_stranger_keeps_no_thread_of_a_host(host: FakeHost, monkeypatch: Any) -> None:
    """A stream without a hello ends by itself."""
    monkeypatch.setattr("actors.data_plane.grpc_stream.CONNECT_TIMEOUT_S", 0.3)
    with grpc.insecure_channel(host.endpoint.grpc_address) as channel:
        silent = threading.Event()
        stream = expert_pb2_grpc.ExpertServiceStub(channel).Dispatch(iter(silent.wait, True))
        assert next(stream).WhichOneof("kind") == "challenge"
        with pytest.raises(grpc.RpcError):
            next(stream)
        silent.set()
