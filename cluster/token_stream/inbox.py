"""The front end's side of the token stream: one mailbox per sequence, and an eye on the workers that fill them.

Knows chunks and signs of life; what is done about a lost worker is `worker_client.py`'s.
"""

from __future__ import annotations

import asyncio
import logging
import secrets
from dataclasses import dataclass, field

from cluster.errors import MoesaicError, Unavailable, WorkerLost
from cluster.logs import log_event
from cluster.token_stream.codec import Item, decode_frame
from cluster.token_stream.frames import (
    CONNECT_TIMEOUT_S,
    StreamAddress,
    end_dead_connection,
    greet_worker,
    read_frame,
    write_name,
)
from cluster.token_stream.progress import Progress
from cluster.types import RequestId, TokenChunk

_LOG = logging.getLogger(__name__)
_WATCH_S = 0.25
_REMEMBERED_S = 30.0  # that a worker went away; by then Serve knows it, too


@dataclass(slots=True, eq=False)
class _Mailbox:
    """Chunks of one sequence, from one worker. early: by whom and what was said before it was known which worker that
    is: Serve submits again where it has lost an answer, and then two workers have the sequence."""

    worker_id: str | None = None
    items: asyncio.Queue[Item] = field(default_factory=asyncio.Queue[Item])
    early: list[tuple[str, Item]] = field(default_factory=list[tuple[str, Item]])


@dataclass(slots=True, eq=False)
class _Peer:
    """A worker's connection, and what it last said of itself."""

    writer: asyncio.StreamWriter
    heard_s: float
    progress: Progress = field(default_factory=Progress)

    def problem(self, now_s: float) -> str | None:
        """Why its sequences are lost; None when it gets on."""
        silent_s = now_s - self.heard_s
        if silent_s > self.progress.silence_s:
            return f"it has said nothing for {silent_s:.1f} s"
        stalled_s = self.progress.stalled_s + silent_s
        return f"it makes no progress for {stalled_s:.1f} s" if stalled_s > self.progress.allowed_s else None


class TokenInbox:
    """The front end's side: one mailbox per sequence."""

    def __init__(self, host: str) -> None:
        self._host = host
        self._secret = secrets.token_hex(16)
        self._mailboxes: dict[RequestId, _Mailbox] = {}
        self._peers: dict[str, _Peer] = {}
        self._gone_s: dict[str, float] = {}
        self._connected = asyncio.Condition()
        self._server: asyncio.Server | None = None
        self._watcher: asyncio.Task[None] | None = None

    async def address(self) -> StreamAddress:
        """Where workers connect; listens from the first call on."""
        if self._server is None:
            self._server = await asyncio.start_server(self._serve, self._host, 0)
            self._watcher = asyncio.create_task(self._watch())
        port: int = self._server.sockets[0].getsockname()[1]
        return StreamAddress(self._host, port, self._secret)

    @property
    def lost(self) -> frozenset[str]:
        """Ids of workers that went away lately, are silent or make no progress."""
        now_s = _now_s()
        gone = {worker_id for worker_id, at_s in self._gone_s.items() if now_s - at_s < _REMEMBERED_S}
        return frozenset(gone.union(i for i, peer in self._peers.items() if peer.problem(now_s) is not None))

    def open(self, request_id: RequestId) -> None:
        """Make a mailbox, before the request is submitted: tokens may be faster than the answer."""
        self._mailboxes[request_id] = _Mailbox()

    async def attach(self, request_id: RequestId, worker_id: str) -> None:
        """Note which worker took the request, so that its loss ends the stream.

        Raises:
            Unavailable: the worker's connection is gone, or does not come; or the worker makes no progress.
        """
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S), self._connected:
                await self._connected.wait_for(lambda: worker_id in self._peers or worker_id in self._gone_s)
        except TimeoutError as error:
            raise Unavailable("the attention worker was lost; try again") from error
        peer = self._peers.get(worker_id)
        if peer is None:
            raise Unavailable("the attention worker was lost; try again")
        mailbox = self._mailboxes.get(request_id)
        if mailbox is not None:
            mailbox.worker_id = worker_id
            early, mailbox.early = mailbox.early, []
            for sender_id, item in early:
                self._deliver(sender_id, request_id, item)
        problem = peer.problem(_now_s())
        if problem is not None:
            raise Unavailable(f"the attention worker is not well: {problem}; try again")

    async def take(self, request_id: RequestId) -> TokenChunk:
        """The next chunk of a sequence.

        Raises:
            MoesaicError: what went wrong in the worker; WorkerLost if it died, was cut off or makes no progress.
        """
        item = await self._mailboxes[request_id].items.get()
        if isinstance(item, MoesaicError):
            raise item
        return item

    def close(self, request_id: RequestId, *, abort: bool) -> None:
        """Forget a sequence; `abort` tells its worker to stop it."""
        mailbox = self._mailboxes.pop(request_id, None)
        peer = None if mailbox is None or mailbox.worker_id is None else self._peers.get(mailbox.worker_id)
        if abort and peer is not None and not peer.writer.is_closing():
            write_name(peer.writer, request_id)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        worker_id, reason = "", "the connection ended"
        try:
            async with asyncio.timeout(CONNECT_TIMEOUT_S):
                worker_id = await greet_worker(reader, writer, self._secret)
            end_dead_connection(writer)
            peer = _Peer(writer, _now_s())
            async with self._connected:
                self._peers[worker_id] = peer
                self._gone_s.pop(worker_id, None)
                self._connected.notify_all()
            while True:
                peer.progress, items = decode_frame(await read_frame(reader))
                peer.heard_s = _now_s()
                for request_id, item in items:
                    self._deliver(worker_id, request_id, item)
        except (OSError, EOFError, TimeoutError, ValueError) as error:
            reason = repr(error)
        finally:
            log_event(_LOG, logging.INFO, "worker disconnected", worker=worker_id, reason=reason)
            writer.close()
            await self._forget(worker_id, writer)

    def _deliver(self, sender_id: str, request_id: RequestId, item: Item) -> None:
        mailbox = self._mailboxes.get(request_id)
        if mailbox is not None and mailbox.worker_id is None:
            mailbox.early.append((sender_id, item))
        elif mailbox is not None and mailbox.worker_id == sender_id:
            mailbox.items.put_nowait(item)
        elif isinstance(item, TokenChunk) and item.finish_reason is None and sender_id in self._peers:
            write_name(self._peers[sender_id].writer, request_id)  # the client left, or another worker has it

    async def _forget(self, worker_id: str, writer: asyncio.StreamWriter) -> None:
        peer = self._peers.get(worker_id)
        if peer is None or peer.writer is not writer:
            return  # it has connected anew
        del self._peers[worker_id]
        async with self._connected:
            self._gone_s = {i: at_s for i, at_s in self._gone_s.items() if _now_s() - at_s < _REMEMBERED_S}
            self._gone_s[worker_id] = _now_s()
            self._connected.notify_all()
        self._lose(worker_id, "its connection is gone")

    def _lose(self, worker_id: str, why: str) -> None:
        for mailbox in self._mailboxes.values():
            if mailbox.worker_id == worker_id:
                mailbox.items.put_nowait(WorkerLost(f"the attention worker was lost ({why}); try again"))

    async def _watch(self) -> None:
        """Find workers whose connection is open and that do not get on."""
        reported: set[str] = set()
        while True:
            slept_s = _now_s()
            await asyncio.sleep(_WATCH_S)
            now_s = _now_s()
            late_s = now_s - slept_s - _WATCH_S
            for worker_id, peer in self._peers.items():
                if late_s > _WATCH_S:  # this process itself stood still: frames may be waiting to be read
                    peer.heard_s += late_s
                problem = peer.problem(now_s)
                if problem is None:
                    reported.discard(worker_id)
                    continue
                if worker_id not in reported:
                    reported.add(worker_id)
                    log_event(_LOG, logging.WARNING, "worker does not get on", worker=worker_id, reason=problem)
                self._lose(worker_id, problem)


def _now_s() -> float:
    return asyncio.get_running_loop().time()
