"""Carries tokens from attention workers back to front ends: one frame a step, not one call a token.

A worker connects to the front end that submitted a request and sends, after each step, one frame with the new
chunks of all its sequences; the front end sends aborts the other way. A closed connection ends what depended on it,
on both sides. (One Ray call per token and sequence cost the engine's process a tenth of its time at 8 streams.)

Frames are a 4-byte length and a pickle; a peer must first prove that it knows the front end's secret, which only
travels through Ray. Knows chunks and sockets; knows nothing of engines or HTTP.
"""

from __future__ import annotations

import asyncio
import contextlib
import hmac
import logging
import pickle
import secrets
import struct
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field

from cluster.errors import MoesaicError, Unavailable
from cluster.observability.logs import log_event
from cluster.types import GenerationRequest, RequestId, TokenChunk

_LOG = logging.getLogger(__name__)
_LENGTH = struct.Struct("<I")
_MAX_FRAME_BYTES = 64 * 2**20
_CONNECT_TIMEOUT_S = 5.0

Item = TokenChunk | MoesaicError
Generate = Callable[[GenerationRequest], AsyncIterator[TokenChunk]]


@dataclass(frozen=True, slots=True)
class StreamAddress:
    """Where a front end takes tokens, and what a worker must show there."""

    host: str
    port: int
    secret: str = field(repr=False)


class TokenInbox:
    """The front end's side: one mailbox per sequence."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._secret = secrets.token_hex(16)
        self._mailboxes: dict[RequestId, asyncio.Queue[Item]] = {}
        self._workers: dict[str, asyncio.StreamWriter] = {}
        self._worker_of: dict[RequestId, str] = {}
        self._connected = asyncio.Condition()
        self._server: asyncio.Server | None = None

    async def address(self) -> StreamAddress:
        """Where workers connect; listens from the first call on."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, self._host, 0)
        port: int = self._server.sockets[0].getsockname()[1]
        return StreamAddress(self._host, port, self._secret)

    def open(self, request_id: RequestId) -> None:
        """Make a mailbox, before the request is submitted: tokens may be faster than the answer."""
        self._mailboxes[request_id] = asyncio.Queue()

    async def attach(self, request_id: RequestId, worker_id: str) -> None:
        """Note which worker took the request, so that its loss ends the stream.

        Raises:
            Unavailable: the worker's connection is gone, or does not come.
        """
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S), self._connected:
                await self._connected.wait_for(lambda: worker_id in self._workers)
        except TimeoutError as error:
            raise Unavailable("the attention worker was lost; try again") from error
        self._worker_of[request_id] = worker_id

    async def take(self, request_id: RequestId) -> TokenChunk:
        """The next chunk of a sequence.

        Raises:
            MoesaicError: what went wrong in the worker; Unavailable if the worker was lost.
        """
        item = await self._mailboxes[request_id].get()
        if isinstance(item, MoesaicError):
            raise item
        return item

    def close(self, request_id: RequestId, *, abort: bool) -> None:
        """Forget a sequence; `abort` tells its worker to stop it."""
        self._mailboxes.pop(request_id, None)
        worker = self._workers.get(self._worker_of.pop(request_id, ""))
        if abort and worker is not None and not worker.is_closing():
            _write(worker, request_id)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        worker_id = ""
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                shown = await reader.readexactly(len(self._secret))
                if not hmac.compare_digest(shown, self._secret.encode()):
                    return
                worker_id = str(await _read(reader))
            async with self._connected:
                self._workers[worker_id] = writer
                self._connected.notify_all()
            while True:
                for request_id, item in await _read(reader):  # type: ignore[attr-defined]
                    mailbox = self._mailboxes.get(request_id)
                    if mailbox is not None:
                        mailbox.put_nowait(item)
                    elif isinstance(item, TokenChunk) and item.finish_reason is None:
                        _write(writer, request_id)  # the client left while its request was being submitted
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            log_event(_LOG, logging.INFO, "worker disconnected", worker=worker_id, reason=repr(error))
        finally:
            writer.close()
            self._lose(worker_id, writer)

    def _lose(self, worker_id: str, writer: asyncio.StreamWriter) -> None:
        if self._workers.get(worker_id) is writer:
            del self._workers[worker_id]
        for request_id, owner in list(self._worker_of.items()):
            if owner == worker_id and (mailbox := self._mailboxes.get(request_id)) is not None:
                mailbox.put_nowait(Unavailable("the attention worker was lost; try again"))


class TokenOutbox:
    """The worker's side: runs submitted sequences and sends what they give, one frame per turn of the event loop."""

    def __init__(self, worker_id: str, generate: Generate) -> None:
        self._worker_id = worker_id
        self._generate = generate
        self._links: dict[StreamAddress, _Link] = {}
        self._connecting = asyncio.Lock()

    async def submit(self, request: GenerationRequest, address: StreamAddress) -> str:
        """Start a sequence whose chunks go to `address`; returns this worker's id.

        Raises:
            Unavailable: the front end cannot be reached.
        """
        async with self._connecting:
            link = self._links.get(address)
            if link is None or link.writer.is_closing():
                link = await self._connect(address)
        link.start(request, self._generate)
        return self._worker_id

    async def _connect(self, address: StreamAddress) -> _Link:
        try:
            async with asyncio.timeout(_CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(address.host, address.port)
        except (OSError, TimeoutError) as error:
            raise Unavailable(f"the front end at {address.host}:{address.port} cannot be reached: {error}") from error
        writer.write(address.secret.encode())
        _write(writer, self._worker_id)
        link = _Link(writer)
        self._links[address] = link
        link.watch(reader, lambda: self._links.pop(address, None))
        return link


class _Link:
    """One connection to a front end and the sequences that stream over it."""

    def __init__(self, writer: asyncio.StreamWriter) -> None:
        self.writer = writer
        self._running: dict[RequestId, asyncio.Task[None]] = {}
        self._outgoing: list[tuple[RequestId, Item]] = []
        self._watcher: asyncio.Task[None] | None = None

    def start(self, request: GenerationRequest, generate: Generate) -> None:
        task = asyncio.create_task(self._pump(request, generate))
        self._running[request.request_id] = task
        task.add_done_callback(lambda _: self._running.pop(request.request_id, None))

    def watch(self, reader: asyncio.StreamReader, on_end: Callable[[], object]) -> None:
        """Take aborts; when the front end is gone, stop everything that streamed to it."""

        async def run() -> None:
            try:
                while True:
                    task = self._running.get(RequestId(str(await _read(reader))))
                    if task is not None:
                        task.cancel()
            except (OSError, EOFError, ValueError):
                pass
            finally:
                on_end()
                self.writer.close()
                for task in list(self._running.values()):
                    task.cancel()

        self._watcher = asyncio.create_task(run())

    async def _pump(self, request: GenerationRequest, generate: Generate) -> None:
        chunks = generate(request)
        try:
            async for chunk in chunks:
                self._put(request.request_id, chunk)
        except MoesaicError as error:
            self._put(request.request_id, error)
        except Exception as error:  # noqa: BLE001 - the client must hear of it, whatever it is
            log_event(_LOG, logging.ERROR, "stream failed", error=error, request_id=request.request_id)
            self._put(request.request_id, MoesaicError(f"the attention worker failed: {error}"))
        finally:
            with contextlib.suppress(RuntimeError):
                await chunks.aclose()  # type: ignore[attr-defined]

    def _put(self, request_id: RequestId, item: Item) -> None:
        if not self._outgoing:  # all sequences of a step wake in this turn of the loop; flush after the last
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append((request_id, item))

    def _flush(self) -> None:
        items, self._outgoing = self._outgoing, []
        if not self.writer.is_closing():
            _write(self.writer, items)


def _write(writer: asyncio.StreamWriter, value: object) -> None:
    body = pickle.dumps(value, protocol=pickle.HIGHEST_PROTOCOL)
    writer.write(_LENGTH.pack(len(body)) + body)


async def _read(reader: asyncio.StreamReader) -> object:
    (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
    if length > _MAX_FRAME_BYTES:
        raise ValueError(f"frame of {length} bytes")
    return pickle.loads(await reader.readexactly(length))
