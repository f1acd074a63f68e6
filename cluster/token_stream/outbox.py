"""The worker's side of the token stream: runs submitted sequences and sends what they give to their front ends."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import AsyncIterator, Callable

from cluster.errors import MoesaicError, Unavailable
from cluster.logs import log_event
from cluster.network.addresses import join_address
from cluster.network.unsent_bytes import UnsentBytes
from cluster.token_stream.codec import Item, encode_frame
from cluster.token_stream.frames import (
    CONNECT_TIMEOUT_S,
    HEARTBEAT_S,
    StreamAddress,
    end_dead_connection,
    greet_front_end,
    read_name,
    write_frame,
)
from cluster.token_stream.progress import Progress
from cluster.types import GenerationRequest, RequestId, TokenChunk

_LOG = logging.getLogger(__name__)

Generate = Callable[[GenerationRequest], AsyncIterator[TokenChunk]]


class TokenOutbox:
    """The worker's side: runs submitted sequences and sends what they give, one frame per turn of the event loop."""

    def __init__(self, worker_id: str, generate: Generate, progress: Callable[[], Progress] = Progress) -> None:
        """Args: progress: how the engine gets on now."""
        self._worker_id = worker_id
        self._generate = generate
        self._progress = progress
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
        writer: asyncio.StreamWriter | None = None
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                reader, writer = await asyncio.open_connection(address.host, address.port)
                await greet_front_end(reader, writer, address.secret, self._worker_id)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            if writer is not None:
                writer.close()
            where = join_address(address.host, address.port)
            raise Unavailable(f"the front end at {where} cannot be reached: {error!r}") from error
        end_dead_connection(writer)
        link = _Link(writer, self._progress)
        self._links[address] = link
        link.watch(reader, lambda: self._links.pop(address, None))
        return link


class _Link:
    """One connection to a front end and the sequences that stream over it."""

    def __init__(self, writer: asyncio.StreamWriter, progress: Callable[[], Progress]) -> None:
        self.writer = writer
        self._progress = progress
        self._running: dict[RequestId, asyncio.Task[None]] = {}
        self._outgoing: list[tuple[RequestId, Item]] = []
        self._tasks: list[asyncio.Task[None]] = []
        self._unsent = UnsentBytes()

    def start(self, request: GenerationRequest, generate: Generate) -> None:
        """Run it, unless it runs: a submission whose answer was lost comes again."""
        request_id = request.request_id
        if request_id in self._running:
            return
        task = asyncio.create_task(self._pump(request_id, generate(request)))
        self._running[request_id] = task
        task.add_done_callback(lambda _: self._running.pop(request_id, None))

    def watch(self, reader: asyncio.StreamReader, on_end: Callable[[], object]) -> None:
        """Take aborts and send signs of life; when the front end is gone, stop everything that streamed to it."""
        beat = asyncio.create_task(self._beat())

        async def run() -> None:
            try:
                while True:
                    task = self._running.get(await read_name(reader))
                    if task is not None:
                        task.cancel()
            except (OSError, EOFError, ValueError):
                pass
            finally:
                on_end()
                beat.cancel()
                self.writer.close()
                for task in list(self._running.values()):
                    task.cancel()

        self._tasks = [beat, asyncio.create_task(run())]

    async def _beat(self) -> None:
        while True:
            self._flush()
            await asyncio.sleep(HEARTBEAT_S)

    async def _pump(self, request_id: RequestId, chunks: AsyncIterator[TokenChunk]) -> None:
        try:
            self._put(
                request_id, TokenChunk(token_ids=())
            )  # taken; a front end that gave it up meanwhile aborts it now
            async for chunk in chunks:
                self._put(request_id, chunk)
        except MoesaicError as error:
            self._put(request_id, error)
        except Exception as error:  # noqa: BLE001 - the client must hear of it, whatever it is
            log_event(_LOG, logging.ERROR, "stream failed", error=error, request_id=request_id)
            self._put(request_id, MoesaicError(f"the attention worker failed: {error}"))
        finally:
            with contextlib.suppress(RuntimeError):
                await chunks.aclose()  # type: ignore[attr-defined]

    def _put(self, request_id: RequestId, item: Item) -> None:
        if not self._outgoing:  # all sequences of a step wake in this turn of the loop; flush after the last
            asyncio.get_running_loop().call_soon(self._flush)
        self._outgoing.append((request_id, item))

    def _flush(self) -> None:
        items, self._outgoing = self._outgoing, []
        if self.writer.is_closing():
            return
        body = encode_frame(self._progress(), items)
        write_frame(self.writer, body)
        self._unsent.note_written(len(body))
        unread = self.writer.transport.get_write_buffer_size()
        problem = self._unsent.problem(unread, asyncio.get_running_loop().time())
        if problem is not None:
            # Its sequences would only go on for nobody: they end here, and another worker may take them up.
            log_event(_LOG, logging.WARNING, "front end does not read its tokens", reason=problem)
            self.writer.transport.abort()
