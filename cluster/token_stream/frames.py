"""Carries tokens from attention workers back to front ends: one frame a step, not one call a token.

A worker connects to the front end that submitted a request and sends, after each step, one frame with the new
chunks of all its sequences; the front end sends aborts the other way. A closed connection ends what depended on it,
on both sides. (One Ray call per token and sequence cost the engine's process a tenth of its time at 8 streams.)
The front end's side is `token_inbox.py`, the worker's `token_outbox.py`; here is what both know.

Every frame says how the worker gets on, and one comes at least every half second: a worker that says nothing, or that
it makes no progress, has lost its sequences like one that is gone. A sequence that another worker goes on with has a
new id there: what a worker that was given up and comes back says under the old one is not taken, and it is told so.

Frames are a 4-byte length and a body, which is data and nothing else (`token_codec.py`). Before anything else both
sides prove that they know the front end's secret, which travels through Ray only and never over this socket
(`handshake.py`). Knows frames and sockets; knows nothing of engines or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import socket
import struct
from dataclasses import dataclass, field

from cluster.network.handshake import NONCE_BYTES, PROOF_BYTES, Handshake, new_nonce
from cluster.types import RequestId

CONNECT_TIMEOUT_S = 5.0
HEARTBEAT_S = 0.5

_LENGTH = struct.Struct("<I")
MAX_FRAME_BYTES = 64 * 2**20
_DEAD_PEER_MS = 10_000

MAX_NAME_BYTES = 512  # of a worker's id, and of a request's


@dataclass(frozen=True, slots=True)
class StreamAddress:
    """Where a front end takes tokens, and what a worker must know there."""

    host: str
    port: int
    secret: str = field(repr=False)


def write_frame(writer: asyncio.StreamWriter, body: bytes) -> None:
    """Send one frame; returns at once."""
    writer.write(_LENGTH.pack(len(body)) + body)


async def read_frame(reader: asyncio.StreamReader, max_bytes: int = MAX_FRAME_BYTES) -> bytes:
    """The body of the next frame.

    Raises:
        OSError, EOFError: the connection ended. ValueError: it is longer than `max_bytes`.
    """
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > max_bytes:
        raise ValueError(f"frame of {length} bytes; {max_bytes} are possible")
    return await reader.readexactly(length)


def write_name(writer: asyncio.StreamWriter, name: str) -> None:
    """Send a frame that is a name: a worker's own, or that of a request to abort."""
    write_frame(writer, name.encode())


async def read_name(reader: asyncio.StreamReader) -> RequestId:
    """The next frame, which is a name. Raises as `read_frame`; ValueError also for one that is no text."""
    return RequestId((await read_frame(reader, MAX_NAME_BYTES)).decode())


async def greet_worker(reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str) -> str:
    """The front end's side of the handshake: who has connected.

    Raises:
        OSError, EOFError: the connection ended. ValueError: it does not know the secret.
    """
    nonce = new_nonce()
    writer.write(nonce)
    theirs = await reader.readexactly(NONCE_BYTES)
    shown = await reader.readexactly(PROOF_BYTES)
    handshake = Handshake(purpose="tokens", listener_nonce=nonce, connector_nonce=theirs)
    if not handshake.is_proven(shown, secret, "connector"):
        raise ValueError("it does not know the secret")
    writer.write(handshake.proof(secret, "listener"))
    return await read_name(reader)


async def greet_front_end(
    reader: asyncio.StreamReader, writer: asyncio.StreamWriter, secret: str, worker_id: str
) -> None:
    """The worker's side of the handshake.

    Raises:
        OSError, EOFError: the connection ended; ours did not convince. ValueError: it does not know the secret.
    """
    nonce = new_nonce()
    theirs = await reader.readexactly(NONCE_BYTES)
    handshake = Handshake(purpose="tokens", listener_nonce=theirs, connector_nonce=nonce)
    writer.write(nonce + handshake.proof(secret, "connector"))
    if not handshake.is_proven(await reader.readexactly(PROOF_BYTES), secret, "listener"):
        raise ValueError("it does not know the secret")
    write_name(writer, worker_id)


def end_dead_connection(writer: asyncio.StreamWriter) -> None:
    """Let the kernel end it within about ten seconds when the other side vanishes without a word (Linux)."""
    connection: socket.socket = writer.get_extra_info("socket")
    with contextlib.suppress(AttributeError, OSError):
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, 4)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, 2)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 3)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, _DEAD_PEER_MS)
