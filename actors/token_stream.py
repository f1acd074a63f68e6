"""Carries tokens from attention workers back to front ends: one frame a step, not one call a token.

A worker connects to the front end that submitted a request and sends, after each step, one frame with the new
chunks of all its sequences; the front end sends aborts the other way. A closed connection ends what depended on it,
on both sides. (One Ray call per token and sequence cost the engine's process a tenth of its time at 8 streams.)
The front end's side is `token_inbox.py`, the worker's `token_outbox.py`; here is what both know.

Every frame says how the worker gets on, and one comes at least every half second: a worker that says nothing, or that
it makes no progress, has lost its sequences like one that is gone. A sequence that another worker goes on with has a
new id there: what a worker that was given up and comes back says under the old one is not taken, and it is told so.

Frames are a 4-byte length and a pickle; a peer must first prove that it knows the front end's secret, which only
travels through Ray. Knows frames and sockets; knows nothing of engines or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import pickle
import socket
import struct
from dataclasses import dataclass, field

from cluster.errors import MoesaicError
from cluster.types import TokenChunk

CONNECT_TIMEOUT_S = 5.0
HEARTBEAT_S = 0.5

_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 64 * 2**20
_DEAD_PEER_MS = 10_000

Item = TokenChunk | MoesaicError


@dataclass(frozen=True, slots=True)
class StreamAddress:
    """Where a front end takes tokens, and what a worker must show there."""

    host: str
    port: int
    secret: str = field(repr=False)


def write_frame(writer: asyncio.StreamWriter, value: object) -> None:
    """Send one frame; returns at once."""
    body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(body)) + body)


async def read_frame(reader: asyncio.StreamReader) -> object:
    """The next frame.

    Raises:
        OSError, EOFError: the connection ended. ValueError: that is no frame of ours.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _MAX_FRAME_BYTES:
        raise ValueError(f"frame of {length} bytes")
    return pickle.loads(await reader.readexactly(length))


def end_dead_connection(writer: asyncio.StreamWriter) -> None:
    """Let the kernel end it within about ten seconds when the other side vanishes without a word (Linux)."""
    connection: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(AttributeError, OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_PEER_MS)
