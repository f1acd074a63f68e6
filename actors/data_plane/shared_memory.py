"""Carrier one: frames lie in memory that worker and host share; a Unix socket only wakes the other side.

The host begins with a challenge. The worker answers it, makes an anonymous file (memfd) and passes it over the host's
abstract socket with a nonce in it; the host maps it, and answers with the nonce that it read there. So it is proven
that both know the host's secret and see the same memory, nothing has a name in the file system, and the memory is gone
with the last of both processes. Abstract sockets belong to a network namespace: a host on another machine, or in
another container network, cannot be reached, and the caller takes another carrier.

The file is cut into slots, each a dispatch area and an answer area; a slot is taken from `send` until its answer is
read.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import mmap
import os
import secrets
import socket
import struct
from dataclasses import asdict, replace

from actors.data_plane.channel import CONNECT_TIMEOUT_S, Hello, HostEndpoint, HostLost, Welcome, remaining_s
from actors.data_plane.frames import (
    MAX_FRAME_BYTES,
    Answer,
    DispatchFrame,
    FrameError,
    RefusalFrame,
    decode_answer,
    encode_dispatch,
)
from cluster.network.handshake import NONCE_BYTES, Handshake, new_nonce

NUM_SLOTS = 4
WAKE = struct.Struct("<IQ")  # slot, bytes of the frame in it
OUTLOOK = 2**32 - 1  # in the place of a slot: what follows is an outlook
MAX_PACKET_BYTES = 192 * 2**10  # of one; less than what a socket takes at once
MAX_HANDSHAKE_BYTES = 64 * 2**10
_PAGE = 4096
# A file that shrinks under a mapping kills whoever touches it: worker and host rule it out for each other.
_SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class SharedSlots:
    """The shared file, as both sides see it: slot i is a dispatch area followed by an answer area of equal size."""

    def __init__(self, fd: int, num_slots: int, slot_bytes: int) -> None:
        self.num_slots = num_slots
        self._slot_bytes = slot_bytes
        self._map = mmap.mmap(fd, num_slots * 2 * slot_bytes)
        view = memoryview(self._map)
        areas = [view[at : at + slot_bytes] for at in range(0, num_slots * 2 * slot_bytes, slot_bytes)]
        self.dispatch = areas[0::2]
        self.answer = areas[1::2]

    @staticmethod
    def check(hello: Hello) -> None:
        """Raise FrameError if a worker asks for a file of an unreasonable size."""
        if not 0 < hello.num_slots <= 64 or not _PAGE <= hello.slot_bytes <= MAX_FRAME_BYTES:
            raise FrameError(f"{hello.num_slots} slots of {hello.slot_bytes} bytes are not possible")


class SharedMemoryChannel:
    """A worker's side of one connection."""

    carrier = "shared memory"

    def __init__(self, wake: socket.socket, slots: SharedSlots, welcome: Welcome, *, checked: bool) -> None:
        self.welcome = welcome
        self._socket = wake
        self._said = wake.dup()  # its own object: outlooks are sent from another thread, and never wait
        self._said.settimeout(0.0)
        self._slots = slots
        self._checked = checked
        self._free = list(range(slots.num_slots))
        self._slot_of: dict[int, int] = {}
        self._arrived: dict[int, Answer] = {}
        self._abandoned: set[int] = set()
        self._held: int | None = None  # slot whose answer the caller is reading
        self._sequence = 0
        self._ended: str | None = None  # why the connection is gone

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def send(self, frame: DispatchFrame) -> None:
        self._release()
        if not self._free:
            raise HostLost(f"host {self.welcome.host_id}: all {self._slots.num_slots} slots are waiting for answers")
        slot = self._free[-1]
        length = encode_dispatch(frame, self._slots.dispatch[slot], checked=self._checked)
        self._free.pop()
        self._slot_of[frame.sequence] = slot
        try:
            self._socket.send(WAKE.pack(slot, length))
        except OSError as error:
            raise self._lost(str(error)) from error

    def receive(self, sequence: int, deadline_s: float) -> Answer:
        if not self.wait_for(sequence, deadline_s):
            raise self._lost("no answer in time")
        if sequence not in self._arrived:
            raise self._lost(self._ended or "the connection ended")
        self._held = self._slot_of.pop(sequence)
        return self._arrived.pop(sequence)

    def wait_for(self, sequence: int, deadline_s: float) -> bool:
        self._release()
        try:
            while sequence not in self._arrived:
                if not self._take_next(remaining_s(deadline_s)):
                    return False
        except HostLost as error:
            self._ended = error.message
        return True

    def send_outlook(self, data: bytes) -> None:
        if WAKE.size + len(data) <= MAX_PACKET_BYTES:
            with contextlib.suppress(OSError):
                self._said.send(WAKE.pack(OUTLOOK, len(data)) + data)

    def abandon(self, sequence: int) -> None:
        self._abandoned.add(sequence)
        if self._arrived.pop(sequence, None) is not None:
            self._drop(sequence)

    def settle(self) -> bool:
        self._release()
        while self._abandoned and self._take_next(0.0):
            pass
        return not self._abandoned

    def close(self) -> None:
        self._socket.close()
        self._said.close()

    def _take_next(self, timeout_s: float) -> bool:
        """Take the next answer in, whosever it is; False if none came in time."""
        try:
            self._socket.settimeout(timeout_s)
            wake = self._socket.recv(WAKE.size)
        except (TimeoutError, BlockingIOError):
            return False
        except OSError as error:
            raise self._lost(str(error)) from error
        if len(wake) != WAKE.size:
            raise self._lost("the connection ended")
        slot, length = WAKE.unpack(wake)
        try:
            answer = decode_answer(self._slots.answer[slot][:length])
        except (FrameError, IndexError) as error:
            raise self._lost(f"damaged answer: {error}") from error
        if isinstance(answer, RefusalFrame) and answer.sequence == 0:
            raise self._lost(f"it could not read a frame: {answer.message}")
        if self._slot_of.get(answer.sequence) != slot:
            raise self._lost(f"answer {answer.sequence} came in slot {slot}, where it was not asked")
        if answer.sequence in self._abandoned:
            self._drop(answer.sequence)
        else:
            self._arrived[answer.sequence] = answer
        return True

    def _drop(self, sequence: int) -> None:
        self._abandoned.discard(sequence)
        self._free.append(self._slot_of.pop(sequence))

    def _release(self) -> None:
        if self._held is not None:
            self._free.append(self._held)
            self._held = None

    def _lost(self, reason: str) -> HostLost:
        self.close()
        prefix = f"host {self.welcome.host_id}: "
        return HostLost(prefix + reason.removeprefix(prefix))


def connect_shared_memory(
    endpoint: HostEndpoint,
    *,
    worker_id: str,
    fingerprint: str,
    slot_bytes: int,
    checked: bool = False,
) -> SharedMemoryChannel:
    """Connect to a host in the same memory. Args: slot_bytes: of the largest frame, either way.

    Raises:
        OSError: the host is not reachable this way, or does not see our memory.
        MoesaicError: the host refuses us; says why.
    """
    slot_bytes = -(-slot_bytes // _PAGE) * _PAGE
    wake = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        wake.settimeout(CONNECT_TIMEOUT_S)
        wake.connect("\0" + endpoint.socket_name)
        fd = os.memfd_create("moesaic-data-plane", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        try:
            os.ftruncate(fd, NUM_SLOTS * 2 * slot_bytes)
            fcntl.fcntl(fd, fcntl.F_ADD_SEALS, _SEALS)
            slots = SharedSlots(fd, NUM_SLOTS, slot_bytes)
            nonce = secrets.token_hex(16)
            slots.dispatch[0][: len(nonce)] = nonce.encode()
            handshake = _challenged(wake)
            hello = Hello(worker_id=worker_id, fingerprint=fingerprint, num_slots=NUM_SLOTS, slot_bytes=slot_bytes)
            proof = handshake.proof(endpoint.secret, "connector")
            message = {**asdict(hello), "connector_nonce": handshake.connector_nonce.hex(), "proof": proof.hex()}
            socket.send_fds(wake, [json.dumps(message).encode()], [fd])
        finally:
            os.close(fd)
        welcome = _welcomed(wake, nonce, handshake, endpoint.secret)
        return SharedMemoryChannel(wake, slots, welcome, checked=checked)
    except BaseException:
        wake.close()
        raise


def send_challenge(connection: socket.socket) -> bytes:
    """The host's first words to who connects: a nonce. Raises OSError if it cannot be said."""
    nonce = new_nonce()
    connection.send(nonce)
    return nonce


def receive_hello(
    connection: socket.socket, secret: str, listener_nonce: bytes
) -> tuple[Hello, SharedSlots, Handshake]:
    """The host's side of the handshake: the worker's hello, with the nonce read from its memory, and that memory.

    Raises:
        FrameError: not a hello of ours, or without the secret. OSError: the connection broke.
    """
    message, fds, _, _ = socket.recv_fds(connection, MAX_HANDSHAKE_BYTES, 1)
    try:
        if not message:
            raise ConnectionResetError("the connection ended before a hello")
        hello, connector_nonce, proof = _parse_hello(message)
        handshake = Handshake(purpose="shared memory", listener_nonce=listener_nonce, connector_nonce=connector_nonce)
        if not handshake.is_proven(proof, secret, "connector"):
            raise FrameError("the worker does not know this host's secret")
        if not fds or fcntl.fcntl(fds[0], fcntl.F_GET_SEALS) & _SEALS != _SEALS:
            raise FrameError("the worker's hello came without its sealed memory")
        SharedSlots.check(hello)
        size = os.fstat(fds[0]).st_size
        if size != hello.num_slots * 2 * hello.slot_bytes:
            raise FrameError(f"the worker's memory has {size} bytes, its hello says otherwise")
        slots = SharedSlots(fds[0], hello.num_slots, hello.slot_bytes)
        nonce = bytes(slots.dispatch[0][:32]).decode(errors="replace")
        return replace(hello, nonce=nonce), slots, handshake
    finally:
        for fd in fds:
            os.close(fd)


def send_welcome(connection: socket.socket, welcome: Welcome | None, refusal: str = "", *, proof: bytes = b"") -> None:
    """Answer a hello: with a welcome and the proof that this is the host, or with the reason why not."""
    value = {"refused": refusal} if welcome is None else {**welcome.to_json(), "proof": proof.hex()}
    with contextlib.suppress(OSError):
        connection.send(json.dumps(value).encode())


def _parse_hello(message: bytes) -> tuple[Hello, bytes, bytes]:
    """The hello, the worker's nonce and its proof."""
    try:
        value = json.loads(message)
        hello = Hello(
            worker_id=str(value["worker_id"]),
            fingerprint=str(value["fingerprint"]),
            num_slots=int(value["num_slots"]),
            slot_bytes=int(value["slot_bytes"]),
        )
        return hello, bytes.fromhex(value["connector_nonce"]), bytes.fromhex(value["proof"])
    except (ValueError, TypeError, KeyError, OverflowError, RecursionError) as error:
        raise FrameError(f"{len(message)} bytes that are no worker's hello") from error


def _challenged(wake: socket.socket) -> Handshake:
    nonce = wake.recv(MAX_HANDSHAKE_BYTES)
    if len(nonce) != NONCE_BYTES:
        raise ConnectionResetError(f"{len(nonce)} bytes where a host's challenge belongs")
    return Handshake(purpose="shared memory", listener_nonce=nonce, connector_nonce=new_nonce())


def _welcomed(wake: socket.socket, nonce: str, handshake: Handshake, secret: str) -> Welcome:
    answer = wake.recv(MAX_HANDSHAKE_BYTES)
    if not answer:
        raise ConnectionResetError("the host closed the connection during the handshake")
    try:
        value = json.loads(answer)
        if "refused" in value:
            raise HostLost(f"the host refused this worker: {value['refused']}")
        is_proven = handshake.is_proven(bytes.fromhex(value.pop("proof")), secret, "listener")
        welcome = Welcome.from_json(value)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConnectionError(f"not a host's welcome: {answer[:40]!r}") from error
    if not is_proven:
        raise ConnectionError("who answers there does not know the host's secret")
    if welcome.nonce != nonce:
        raise ConnectionError("the host does not see this worker's memory")
    return welcome
