"""Tokens on their way from workers to front ends: order, frames, aborts, and either side's end. Real sockets."""

from __future__ import annotations

import asyncio
import pickle
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial

import pytest

import cluster.token_stream.outbox as token_outbox
from cluster.errors import Overloaded, Unavailable, WorkerLost
from cluster.network.unsent_bytes import UnsentBytes
from cluster.token_stream.frames import StreamAddress, write_frame
from cluster.token_stream.inbox import TokenInbox
from cluster.token_stream.outbox import TokenOutbox
from cluster.token_stream.progress import Progress
from cluster.types import FinishReason, GenerationRequest, RequestId, SamplingParams, TokenChunk

DEADLINE_S = 10.0


class Source:
    """Stands in for a worker's engine: emits 0, 1, 2, ... one per `tick`, to all sequences at once."""

    def __init__(self, length: int = 1_000_000) -> None:
        self.length = length
        self.ticks: dict[RequestId, asyncio.Queue[int]] = {}
        self.ended: list[RequestId] = []
        self.error: Exception | None = None
        self.progress = Progress()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        ticks = self.ticks[request.request_id] = asyncio.Queue()
        try:
            if self.error is not None:
                raise self.error
            for i in range(self.length):
                await ticks.get()
                last = i == self.length - 1
                yield TokenChunk(token_ids=(i,), finish_reason=FinishReason.LENGTH if last else None)
        finally:
            self.ended.append(request.request_id)

    def tick(self) -> None:
        for ticks in self.ticks.values():
            ticks.put_nowait(1)


def _request(name: str) -> GenerationRequest:
    return GenerationRequest(request_id=RequestId(name), prompt_ids=(1,), sampling=SamplingParams(max_tokens=5))


def _run(test: Callable[[TokenInbox, TokenOutbox, Source], Awaitable[None]], source: Source | None = None) -> None:
    async def run() -> None:
        used = source or Source()
        async with asyncio.timeout(DEADLINE_S):
            await test(TokenInbox("127.0.0.1"), TokenOutbox("w0", used.generate, lambda: used.progress), used)

    asyncio.run(run())


async def _start(inbox: TokenInbox, outbox: TokenOutbox, *names: str) -> None:
    """Submitted, and the worker has said that it has them."""
    for name in names:
        inbox.open(RequestId(name))
        worker = await outbox.submit(_request(name), await inbox.address())
        await inbox.attach(RequestId(name), worker)
        assert (await inbox.take(RequestId(name))).token_ids == ()


async def _until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)


def test_chunks_of_several_sequences_arrive_in_order_and_end() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a", "b")
        await _until(lambda: len(source.ticks) == 2)
        for _ in range(3):
            source.tick()
        for name in ("a", "b"):
            chunks = [await inbox.take(RequestId(name)) for _ in range(3)]
            assert [chunk.token_ids for chunk in chunks] == [(0,), (1,), (2,)]
            assert chunks[-1].finish_reason is FinishReason.LENGTH

    _run(test, Source(length=3))


def test_one_step_is_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[object] = []
    write = token_outbox.write_frame
    monkeypatch.setattr(token_outbox, "write_frame", lambda writer, value: (frames.append(value), write(writer, value)))
    monkeypatch.setattr(token_outbox, "HEARTBEAT_S", DEADLINE_S)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        names = [f"r{i}" for i in range(8)]
        await _start(inbox, outbox, *names)
        await _until(lambda: len(source.ticks) == 8)
        frames.clear()
        source.tick()
        for name in names:
            await inbox.take(RequestId(name))
        assert len(frames) == 1

    _run(test)


def test_closing_a_stream_stops_its_sequence_and_no_other() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a", "b")
        await _until(lambda: len(source.ticks) == 2)
        inbox.close(RequestId("a"), abort=True)
        await _until(lambda: source.ended == ["a"])
        source.tick()
        assert (await inbox.take(RequestId("b"))).token_ids == (0,)

    _run(test)


def test_a_client_that_left_during_submission_is_stopped_before_its_first_token() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        inbox.open(RequestId("a"))
        address = await inbox.address()
        inbox.close(RequestId("a"), abort=True)
        await outbox.submit(_request("a"), address)
        await _until(lambda: source.ended == ["a"])

    _run(test)


def test_errors_of_the_worker_reach_the_stream() -> None:
    source = Source()
    source.error = Overloaded("the queue is full", param="x")

    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        await _start(inbox, outbox, "a")
        with pytest.raises(Overloaded, match="the queue is full") as caught:
            await inbox.take(RequestId("a"))
        assert caught.value.param == "x"

    _run(test, source)


def test_a_lost_worker_ends_its_streams_after_what_it_said() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        await _until(lambda: len(source.ticks) == 1)
        source.tick()
        await _until(lambda: not inbox._mailboxes[RequestId("a")].items.empty())
        for link in outbox._links.values():
            link.writer.transport.abort()
        await _until(lambda: inbox.lost == {"w0"})
        assert (await inbox.take(RequestId("a"))).token_ids == (0,)
        with pytest.raises(WorkerLost, match="connection is gone"):
            await inbox.take(RequestId("a"))
        await _until(lambda: source.ended == ["a"])

    _run(test)


def test_a_silent_worker_has_lost_its_sequences_and_is_told_so_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_outbox, "HEARTBEAT_S", DEADLINE_S)  # as if its event loop stood still
    source = Source()
    source.progress = Progress(silence_s=0.3)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        with pytest.raises(WorkerLost, match="said nothing for"):
            await inbox.take(RequestId("a"))
        assert inbox.lost == {"w0"}

        inbox.close(RequestId("a"), abort=True)  # the front end gives the sequence to another worker
        await _until(lambda: source.ended == ["a"])

    _run(test, source)


def test_a_worker_that_says_that_it_stands_still_has_lost_its_sequences() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        source.progress = Progress(stalled_s=9.0, allowed_s=2.0)
        with pytest.raises(WorkerLost, match="no progress for 9"):
            await inbox.take(RequestId("a"))
        inbox.open(RequestId("b"))
        worker = await outbox.submit(_request("b"), await inbox.address())
        with pytest.raises(Unavailable, match="no progress"):
            await inbox.attach(RequestId("b"), worker)

        source.progress = Progress()
        await _until(lambda: not inbox.lost)

    _run(test)


def test_a_waiting_worker_with_signs_of_life_keeps_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_outbox, "HEARTBEAT_S", 0.1)
    source = Source()
    source.progress = Progress(stalled_s=5.0, allowed_s=30.0, silence_s=0.5)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.take(RequestId("a")), 1.2)
        assert not inbox.lost

    _run(test, source)


def test_late_tokens_of_a_sequence_that_another_worker_has_are_nobodys() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        await _until(lambda: len(source.ticks) == 1)
        inbox._mailboxes.pop(RequestId("a"))  # given up, and the abort did not get through
        inbox.open(RequestId("a+1"))
        source.tick()
        await _until(lambda: source.ended == ["a"])
        assert inbox._mailboxes[RequestId("a+1")].items.empty()

    _run(test)


def test_of_two_workers_that_got_one_submission_only_the_one_that_answered_for_it_is_heard() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        other = Source()
        inbox.open(RequestId("a"))
        await TokenOutbox("w1", other.generate).submit(_request("a"), await inbox.address())
        worker = await outbox.submit(_request("a"), await inbox.address())
        await _until(lambda: len(other.ticks) == len(source.ticks) == 1)
        other.tick()  # sooner than the answer that says who has it
        source.tick()
        await asyncio.sleep(0.1)
        await inbox.attach(RequestId("a"), worker)
        await _until(lambda: other.ended == ["a"])
        source.tick()

        assert [(await inbox.take(RequestId("a"))).token_ids for _ in range(3)] == [(), (0,), (1,)]
        assert source.ended == []

    _run(test)


def test_a_submission_that_comes_twice_runs_once() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        await _until(lambda: len(source.ticks) == 1)
        source.tick()
        await outbox.submit(_request("a"), await inbox.address())
        await _start(inbox, outbox, "b")
        await _until(lambda: len(source.ticks) >= 2)  # begun after the second "a" would have been
        source.tick()

        assert [(await inbox.take(RequestId("a"))).token_ids for _ in range(2)] == [(0,), (1,)]
        assert len(source.ticks) == 2

    _run(test)


def test_a_lost_front_end_stops_what_streamed_to_it() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a", "b")
        await _until(lambda: len(source.ticks) == 2)
        for peer in list(inbox._peers.values()):
            peer.writer.transport.abort()
        await _until(lambda: sorted(source.ended) == ["a", "b"])

    _run(test)


def test_a_stranger_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.token_stream.inbox.CONNECT_TIMEOUT_S", 0.5)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        address = await inbox.address()
        inbox.open(RequestId("a"))
        forged = StreamAddress(address.host, address.port, "0" * len(address.secret))
        with pytest.raises(Unavailable):
            await outbox.submit(_request("a"), forged)
        with pytest.raises(Unavailable):
            await inbox.attach(RequestId("a"), "w0")

    _run(test)


def test_a_front_end_that_cannot_be_reached_is_an_error() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        address = await inbox.address()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await outbox.submit(_request("a"), StreamAddress(address.host, 1, address.secret))

    _run(test)


def test_the_secret_does_not_cross_the_network_and_what_crosses_is_data() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        address = await inbox.address()
        heard = bytearray()

        async def copy(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            while data := await reader.read(2**16):
                heard.extend(data)
                writer.write(data)

        async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            front_reader, front_writer = await asyncio.open_connection(address.host, address.port)
            await asyncio.gather(copy(reader, front_writer), copy(front_reader, writer))

        between = await asyncio.start_server(serve, "127.0.0.1", 0)
        tapped = StreamAddress("127.0.0.1", between.sockets[0].getsockname()[1], address.secret)
        inbox.open(RequestId("a"))
        await inbox.attach(RequestId("a"), await outbox.submit(_request("a"), tapped))
        await _until(lambda: len(source.ticks) == 1)
        source.tick()
        assert [(await inbox.take(RequestId("a"))).token_ids for _ in range(2)] == [(), (0,)]
        assert address.secret.encode() not in heard
        assert bytes.fromhex(address.secret) not in heard
        assert b"cluster.types" not in heard, "no name of a class that the other side would make"

    _run(test)


def test_a_front_end_that_does_not_know_the_secret_gets_no_tokens() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        heard = bytearray()

        async def forge(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            writer.write(bytes(32))
            heard.extend(await reader.readexactly(64))
            writer.write(heard[-32:])  # the worker's own proof, reflected
            heard.extend(await reader.read())

        forger = await asyncio.start_server(forge, "127.0.0.1", 0)
        with pytest.raises(Unavailable, match="does not know the secret"):
            await outbox.submit(_request("a"), StreamAddress("127.0.0.1", forger.sockets[0].getsockname()[1], "s3cret"))
        assert not source.ticks
        await _until(lambda: len(heard) == 64)

    _run(test)


@pytest.mark.parametrize("body", [pickle.dumps(("x", [])), b"", b"\x93\x01\x02\x03", b"\xff" * 100, b"\x91" * 5000])
def test_a_frame_that_is_none_of_ours_ends_its_connection_and_runs_nothing(body: bytes) -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        link = next(iter(outbox._links.values()))
        write_frame(link.writer, body)
        with pytest.raises(WorkerLost, match="connection is gone"):
            await inbox.take(RequestId("a"))

    _run(test)


def test_a_front_end_that_stands_still_loses_its_sequences_and_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not read is bounded: its connection ends, its sequences stop, and others do not notice."""
    monkeypatch.setattr(token_outbox, "UnsentBytes", partial(UnsentBytes, max_bytes=100_000))
    source = Source()

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        stalled = TokenInbox("127.0.0.1")
        stalled.open(RequestId("s"))
        await stalled.attach(RequestId("s"), await outbox.submit(_request("s"), await stalled.address()))
        await _start(inbox, outbox, "a")
        await _until(lambda: len(source.ticks) == 2)
        for peer in stalled._peers.values():  # as if that process stood still
            peer.writer.transport.pause_reading()
        link = outbox._links[await stalled.address()]
        most = 0
        while "s" not in source.ended:
            source.ticks[RequestId("s")].put_nowait(1)
            link._put(RequestId("s"), TokenChunk(token_ids=(7,) * 10_000))
            await asyncio.sleep(0)
            most = max(most, link.writer.transport.get_write_buffer_size())
        assert most < 1_000_000
        source.ticks[RequestId("a")].put_nowait(1)
        assert (await inbox.take(RequestId("a"))).token_ids == (0,)
        assert source.ended == ["s"]

    _run(test, source)
