"""What a host's socket gets thrown at: it goes on serving others, keeps no file open and leaves nothing behind."""

from __future__ import annotations

import contextlib
import fcntl
import gc
import json
import mmap
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import fake_host
import numpy as np
import pytest
from fake_host import (
    DIM,
    FINGERPRINT,
    SECRET,
    FakeHost,
    connect,
    expected_sums,
    make_frame,
    running_host,
    soon,
    wait_until,
)

from actors.data_plane.channel import ExpertChannel
from actors.data_plane.frames import CombineFrame, DispatchFrame, encode_dispatch
from actors.data_plane.shared_memory import WAKE
from cluster.network.handshake import NONCE_BYTES, Handshake, new_nonce

SLOTS, SLOT_BYTES = 2, 4096
SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


@pytest.fixture
def host() -> Iterator[FakeHost]:
    """Whatever a test does to it: it answers a worker that was there before, and nothing stays behind."""
    with running_host() as running:
        innocent = connect("shared_memory", running.endpoint)
        _serve(innocent)
        files, in_memory = _open_files(), set(os.listdir("/dev/shm"))
        yield running
        _serve(innocent)
        newcomer = connect("shared_memory", running.endpoint)
        _serve(newcomer)
        newcomer.close()
        del newcomer
        wait_until(lambda: running.handler.num_connections == 1, "others are gone")
        wait_until(lambda: _open_files() <= files, "no file stays open")
        gc.collect()
        wait_until(lambda: _num_mappings() == 2, "no memory stays mapped: the innocent's, on both sides")
        assert set(os.listdir("/dev/shm")) <= in_memory
        innocent.close()


def _serve(channel: ExpertChannel) -> None:
    frame = make_frame(channel, 5)
    channel.send(frame)
    answer = channel.receive(frame.sequence, soon())
    assert isinstance(answer, CombineFrame)
    assert np.array_equal(answer.rows, expected_sums(frame))


def _open_files() -> int:
    return len(os.listdir("/proc/self/fd"))


def _num_mappings() -> int:
    return Path("/proc/self/maps").read_text().count("memfd:moesaic")


def _dial(host: FakeHost) -> socket.socket:
    peer = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    peer.settimeout(10)
    peer.connect("\0" + host.endpoint.socket_name)
    return peer


def _challenge(peer: socket.socket) -> bytes:
    """The host's first words."""
    nonce = peer.recv(2**16)
    assert len(nonce) == NONCE_BYTES
    return nonce


def _hello(challenge: bytes = b"", *, secret: str = SECRET, **changes: Any) -> bytes:
    """Args: challenge: of the host; without it the proof is one of another connection."""
    handshake = Handshake(purpose="shared memory", listener_nonce=challenge, connector_nonce=new_nonce())
    hello = {
        "connector_nonce": handshake.connector_nonce.hex(),
        "proof": handshake.proof(secret, "connector").hex(),
        "worker_id": "abuser",
        "fingerprint": FINGERPRINT,
        "num_slots": SLOTS,
        "slot_bytes": SLOT_BYTES,
        "nonce": "",
    }
    return json.dumps(hello | changes).encode()


def _memory(size: int = SLOTS * 2 * SLOT_BYTES, seals: int = SEALS) -> int:
    fd = os.memfd_create("moesaic-abuse", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, size)
    fcntl.fcntl(fd, fcntl.F_ADD_SEALS, seals)
    return fd


def _is_ended(peer: socket.socket) -> bool:
    """The host hung up, perhaps after saying why."""
    try:
        while peer.recv(2**16):
            pass
    except ConnectionResetError:
        pass
    return True


@pytest.mark.parametrize(
    "garbage",
    [
        b"\x00",
        b"GET / HTTP/1.1\r\n\r\n",
        b"{}",
        b"[]",
        b"null",
        b"7",
        b"\xff" * 60_000,
        b"[" * 60_000,
        b'{"proof": ' * 5_000,
        _hello(proof=5),
        _hello(proof=None),
        _hello(proof="\u00e4\ud800"),
        _hello(proof="0" * 63),
        _hello(connector_nonce="00"),
        _hello(connector_nonce=["a"] * 100),
        _hello(num_slots="many"),
        _hello(num_slots=float("inf")),
        _hello(num_slots=10**30),
        _hello(slot_bytes=[1]),
        _hello(extra="field")[:-3],
    ],
)
def test_garbage_for_a_hello_ends_that_connection_only(host: FakeHost, garbage: bytes) -> None:
    with _dial(host) as peer:
        peer.send(garbage)
        assert _is_ended(peer)


@pytest.mark.parametrize(
    ("changes", "size", "seals"),
    [
        ({}, None, SEALS),
        ({}, SLOTS * 2 * SLOT_BYTES, 0),
        ({}, SLOTS * 2 * SLOT_BYTES, fcntl.F_SEAL_SHRINK),
        ({}, SLOTS * 2 * SLOT_BYTES - 1, SEALS),
        ({}, 0, SEALS),
        ({}, SLOTS * 2 * SLOT_BYTES, SEALS | fcntl.F_SEAL_WRITE),
        ({"num_slots": 0}, 0, SEALS),
        ({"num_slots": -1, "slot_bytes": -4096}, SLOTS * 2 * SLOT_BYTES, SEALS),
        ({"num_slots": 65}, 65 * 2 * SLOT_BYTES, SEALS),
        ({"slot_bytes": 64}, SLOTS * 2 * 64, SEALS),
        ({"slot_bytes": 2**40}, SLOTS * 2 * SLOT_BYTES, SEALS),
        ({"proof": "00" * 32}, SLOTS * 2 * SLOT_BYTES, SEALS),
        ({"fingerprint": "other"}, SLOTS * 2 * SLOT_BYTES, SEALS),
    ],
)
def test_hello_without_the_memory_it_promises_is_refused(
    host: FakeHost, changes: dict[str, Any], size: int | None, seals: int
) -> None:
    with _dial(host) as peer:
        hello = _hello(_challenge(peer), **changes)
        if size is None:
            peer.send(hello)
        else:
            fd = _memory(size, seals)
            socket.send_fds(peer, [hello], [fd])
            os.close(fd)
        assert _is_ended(peer)


@pytest.mark.parametrize("what", ["/dev/null", "socket", "directory", "many"])
def test_file_that_is_no_memory_is_refused(host: FakeHost, what: str, tmp_path: Path) -> None:
    pair = socket.socketpair()
    fds = {
        "/dev/null": lambda: [os.open("/dev/null", os.O_RDWR)],
        "socket": lambda: [os.dup(pair[0].fileno())],
        "directory": lambda: [os.open(tmp_path, os.O_RDONLY)],
        "many": lambda: [os.open("/dev/null", os.O_RDWR) for _ in range(20)],
    }[what]()
    with _dial(host) as peer, pair[0], pair[1]:
        socket.send_fds(peer, [_hello(_challenge(peer))], fds)
        for fd in fds:
            os.close(fd)
        assert _is_ended(peer)


def _greeted(host: FakeHost) -> tuple[socket.socket, mmap.mmap]:
    """A worker in good standing, by hand."""
    peer, fd = _dial(host), _memory()
    socket.send_fds(peer, [_hello(_challenge(peer))], [fd])
    assert b"host_id" in peer.recv(2**16)
    memory = mmap.mmap(fd, SLOTS * 2 * SLOT_BYTES)
    os.close(fd)
    return peer, memory


@pytest.mark.parametrize(
    "wake",
    [
        WAKE.pack(SLOTS, 128),
        WAKE.pack(2**32 - 1, 128),
        WAKE.pack(0, 0),
        WAKE.pack(0, 127),
        WAKE.pack(0, 2**64 - 1),
        WAKE.pack(1, SLOT_BYTES),
        b"short",
        b"long" * 100,
    ],
)
def test_wake_for_no_frame_ends_that_connection_only(host: FakeHost, wake: bytes) -> None:
    peer, memory = _greeted(host)
    with peer, memory:
        memory[:64] = os.urandom(64)
        peer.send(wake)
        assert _is_ended(peer)


def test_answer_that_does_not_fit_the_workers_memory_ends_that_connection_only(host: FakeHost) -> None:
    """bfloat16 rows that fill their area have an answer of twice the size."""
    peer, memory = _greeted(host)
    frame = make_frame(_Numbers(), 66, rows=np.zeros((66, DIM), np.uint16))
    with peer, memory:
        peer.send(WAKE.pack(0, _put(memory, frame)))
        assert _is_ended(peer)


def _put(memory: mmap.mmap, frame: DispatchFrame) -> int:
    buffer = bytearray(SLOT_BYTES)
    length = encode_dispatch(frame, buffer)
    memory[:length] = bytes(buffer[:length])
    return length


class _Numbers:
    """Enough of a channel to make a frame for."""

    def __init__(self) -> None:
        self.welcome = SimpleNamespace(epoch=1)

    def next_sequence(self) -> int:
        return 1


def test_hundred_connections_that_come_and_go(host: FakeHost) -> None:
    for _ in range(100):
        _dial(host).close()
    for turn in range(20):
        peer, memory = _greeted(host)
        if turn % 2:
            peer.send(WAKE.pack(0, 128))
        peer.close()
        memory.close()


def test_connections_that_never_say_hello_are_ended_in_time(host: FakeHost, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("actors.expert_host.handler.CONNECT_TIMEOUT_S", 0.2)
    peers = [_dial(host) for _ in range(30)]
    with contextlib.closing(connect("shared_memory", host.endpoint)) as channel:
        _serve(channel)
    for peer in peers:
        assert _is_ended(peer)
        peer.close()


def test_worker_that_does_not_read_its_answers_is_dropped(host: FakeHost) -> None:
    """Its socket fills; the host never waits for it."""
    peer, memory = _greeted(host)
    with peer, memory:
        length = _put(memory, make_frame(_Numbers(), 1))
        with pytest.raises(OSError):
            for _ in range(100_000):
                peer.send(WAKE.pack(0, length))


def test_worker_killed_in_the_middle_of_a_frame_harms_nobody(host: FakeHost) -> None:
    script = (
        "import sys, os\n"
        "import fake_host\n"
        "from actors.data_plane.channel import HostEndpoint\n"
        "endpoint = HostEndpoint(host_id='host', socket_name=sys.argv[1], grpc_address='', secret=fake_host.SECRET)\n"
        "channel = fake_host.connect('shared_memory', endpoint)\n"
        "for seed in range(4):\n"
        "    channel.send(fake_host.make_frame(channel, 60, seed=seed))\n"
        "print('sent', flush=True)\n"
        "sys.stdin.read()\n"
    )
    host.backend.at_gate.clear()
    host.backend.gate.clear()
    root = Path(fake_host.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": f"{root / 'tests'}:{root / 'tests' / 'builders'}:{root}"}
    with subprocess.Popen(
        [sys.executable, "-c", script, host.endpoint.socket_name],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env=environment,
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"sent\n"
        assert host.backend.at_gate.wait(10), "its first frame is being computed"
        os.kill(worker.pid, signal.SIGKILL)
        worker.wait(10)
    host.backend.gate.set()


def test_host_that_stops_leaves_nothing() -> None:
    files, before = _open_files(), _num_mappings()
    for _ in range(3):
        with running_host() as host:
            shared, streamed = connect("shared_memory", host.endpoint), connect("grpc", host.endpoint)
            _serve(shared)
            _serve(streamed)
        shared.close()
        streamed.close()
        del shared, streamed, host
    gc.collect()
    assert _num_mappings() == before
    wait_until(lambda: _open_files() <= files + 8, "sockets are closed; gRPC keeps a few descriptors of its own")
