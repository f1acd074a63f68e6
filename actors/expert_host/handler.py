"""The first of a host's four classes: connections in, dispatch tasks out. Knows sockets and frames; computes nothing.

The device owner polls it between batches, in its own thread: on the shared-memory path no thread hands over to another.
Frames of other carriers come through `submit`, from threads of theirs.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import secrets
import select
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from actors.data_plane.channel import CONNECT_TIMEOUT_S, Hello, OutlookSink, Welcome
from actors.data_plane.frames import (
    Answer,
    FrameError,
    RefusalFrame,
    RefusalReason,
    combine_bytes,
    decode_dispatch,
    encode_answer,
)
from actors.data_plane.shared_memory import (
    MAX_PACKET_BYTES,
    OUTLOOK,
    WAKE,
    SharedSlots,
    receive_hello,
    send_challenge,
    send_welcome,
)
from actors.data_plane.task import DispatchTask
from cluster.logs import log_event

_LOG = logging.getLogger(__name__)
_BACKLOG = 1024  # a full one refuses: all workers may come while a batch is computed
_MAX_CONNECTIONS = 256  # each has two open files


@dataclass(slots=True, eq=False)
class _Connection:
    """A worker's socket; `nonce` is what it was asked, `slots` come with its hello."""

    socket: socket.socket
    accepted_s: float
    nonce: bytes
    slots: SharedSlots | None = None


class HostHandler:
    """Takes workers in and their frames; `welcome` says what this host owns now."""

    def __init__(
        self, welcome: Callable[[Hello], Welcome], outlooks: OutlookSink, *, secret: str, checked: bool = False
    ) -> None:
        """Args: welcome: raises FrameError to refuse a worker. outlooks: hears what workers expect. checked: answers
        carry a checksum of their rows."""
        self.num_frames = 0
        self.num_rows = 0
        self.num_damaged = 0
        self._welcome = welcome
        self._outlooks = outlooks
        self._packet = bytearray(MAX_PACKET_BYTES)
        self._secret = secret
        self._checked = checked
        self.socket_name = f"moesaic-{secrets.token_hex(12)}"
        self._listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        self._listener.bind("\0" + self.socket_name)
        self._listener.listen(_BACKLOG)
        self._listener.setblocking(False)
        self._wake = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._submitted: queue.SimpleQueue[DispatchTask] = queue.SimpleQueue()
        self._closing = threading.Lock()
        self._closed = False
        self._connections: dict[int, _Connection] = {}
        self._num_silent = 0  # at most: those of them without a hello
        self._poll = select.epoll()
        self._poll.register(self._listener, select.EPOLLIN)
        self._poll.register(self._wake, select.EPOLLIN)

    @property
    def num_connections(self) -> int:
        """Workers that were welcomed."""
        return sum(connection.slots is not None for connection in list(self._connections.values()))

    def submit(self, task: DispatchTask) -> None:
        """Hand in a frame from another thread; refused at once when the host stops."""
        with self._closing:
            if not self._closed:
                self._submitted.put(task)
                os.eventfd_write(self._wake, 1)
                return
        _refuse_stopped(task)

    def wake(self) -> None:
        """End a poll under way."""
        with self._closing:
            if not self._closed:
                os.eventfd_write(self._wake, 1)

    def poll(self, timeout_s: float) -> list[DispatchTask]:
        """Frames that are there, waiting up to `timeout_s` for the first; takes in new workers on the way."""
        tasks: list[DispatchTask] = []
        for fd, _ in self._poll.poll(timeout_s):
            if fd == self._wake:
                self._take_submitted(tasks)
            elif fd == self._listener.fileno():
                self._accept()
            elif (connection := self._connections.get(fd)) is not None:
                self._read(connection, tasks)
        self._drop_silent()
        self.num_frames += len(tasks)
        self.num_rows += sum(len(task.frame.rows) for task in tasks)
        return tasks

    def close(self) -> None:
        """End all connections: workers see it at once. Idempotent; not while another thread polls."""
        with self._closing:  # the wake-up's number may be another file's as soon as it is closed
            if self._closed:
                return
            self._closed = True
            os.close(self._wake)
        for connection in list(self._connections.values()):
            self._drop(connection)
        self._listener.close()
        self._poll.close()
        for task in self._drain_submitted():
            _refuse_stopped(task)

    def _take_submitted(self, tasks: list[DispatchTask]) -> None:
        os.eventfd_read(self._wake)
        tasks.extend(self._drain_submitted())

    def _drain_submitted(self) -> Iterator[DispatchTask]:
        with contextlib.suppress(queue.Empty):
            while True:
                yield self._submitted.get_nowait()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):  # ends with one: nobody else waits
            while True:
                accepted, _ = self._listener.accept()
                if len(self._connections) >= _MAX_CONNECTIONS:
                    accepted.close()
                    continue
                accepted.setblocking(False)
                try:
                    nonce = send_challenge(accepted)
                except OSError:  # gone already: the next may still be there
                    accepted.close()
                    continue
                self._connections[accepted.fileno()] = _Connection(accepted, time.monotonic(), nonce)
                self._poll.register(accepted, select.EPOLLIN)
                self._num_silent += 1

    def _drop_silent(self) -> None:
        """End connections that did not say hello in time."""
        if not self._num_silent:
            return
        silent = [connection for connection in self._connections.values() if connection.slots is None]
        oldest_s = time.monotonic() - CONNECT_TIMEOUT_S
        for connection in silent:
            if connection.accepted_s < oldest_s:
                self._drop(connection)
        self._num_silent = len(silent)

    def _read(self, connection: _Connection, tasks: list[DispatchTask]) -> None:
        try:
            if connection.slots is None:
                self._greet(connection)
                return
            num_bytes = connection.socket.recv_into(self._packet)
            if num_bytes < WAKE.size:
                self._drop(connection)  # the worker has gone
                return
            slot, length = WAKE.unpack_from(self._packet)
            if slot == OUTLOOK:
                if length != num_bytes - WAKE.size:
                    raise FrameError(f"an outlook of {length} bytes of which {num_bytes - WAKE.size} came")
                self._outlooks.hear(connection.nonce, bytes(self._packet[WAKE.size : num_bytes]))
                return
            if slot >= connection.slots.num_slots:
                raise FrameError(f"slot {slot} of {connection.slots.num_slots}")
            self._take(connection, connection.slots, slot, length, tasks)
        except BlockingIOError:
            return
        except FrameError as error:
            self.num_damaged += 1
            log_event(_LOG, logging.WARNING, "worker disconnected", reason=error.message)
            self._drop(connection)
        except OSError:
            self._drop(connection)

    def _take(
        self, connection: _Connection, slots: SharedSlots, slot: int, length: int, tasks: list[DispatchTask]
    ) -> None:
        reply = partial(self._reply, connection, slots, slot)
        try:
            frame = decode_dispatch(slots.dispatch[slot][:length])
            needed, room = combine_bytes(*frame.rows.shape), len(slots.answer[slot])
            if needed > room:
                raise FrameError(f"the answer of {needed} bytes does not fit the worker's {room}")
        except FrameError as error:
            reply(RefusalFrame(sequence=0, reason=RefusalReason.DAMAGED, epoch=0, message=error.message))
            raise
        tasks.append(DispatchTask(frame, reply))

    def _greet(self, connection: _Connection) -> None:
        try:
            hello, slots, handshake = receive_hello(connection.socket, self._secret, connection.nonce)
            welcome = replace(self._welcome(hello), nonce=hello.nonce)
        except FrameError as error:
            send_welcome(connection.socket, None, error.message)
            raise
        connection.slots = slots
        send_welcome(connection.socket, welcome, proof=handshake.proof(self._secret, "listener"))

    def _reply(self, connection: _Connection, slots: SharedSlots, slot: int, answer: Answer) -> None:
        try:
            length = encode_answer(answer, slots.answer[slot], checked=self._checked)
            connection.socket.send(WAKE.pack(slot, length))
        except OSError:  # the worker has gone, or does not read: its connection ends, nothing else
            self._drop(connection)

    def _drop(self, connection: _Connection) -> None:
        fd = connection.socket.fileno()
        if self._connections.pop(fd, None) is not None:
            self._poll.unregister(fd)
            self._outlooks.forget(connection.nonce)  # a name, not the connection: nobody keeps its memory
        connection.socket.close()


def _refuse_stopped(task: DispatchTask) -> None:
    task.refuse(RefusalReason.FAILED, 0, "the host stops")
