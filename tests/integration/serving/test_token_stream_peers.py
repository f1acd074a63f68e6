"""Who may send and take tokens: strangers, secrets, frames that are none, and a front end that stands still."""

from __future__ import annotations

import asyncio
import pickle
from functools import partial

import pytest
from token_sources import Source, run_streams, start_streams, submitted, wait_until

import cluster.token_stream.outbox as token_outbox
from cluster.errors import Unavailable, WorkerLost
from cluster.network.unsent_bytes import UnsentBytes
from cluster.token_stream.frames import StreamAddress, write_frame
from cluster.token_stream.inbox import TokenInbox
from cluster.token_stream.outbox import TokenOutbox
from cluster.types import RequestId, TokenChunk


def test_a_lost_front_end_stops_what_streamed_to_it() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a", "b")
        await wait_until(lambda: len(source.ticks) == 2)
        for peer in list(inbox._peers.values()):
            peer.writer.transport.abort()
        await wait_until(lambda: sorted(source.ended) == ["a", "b"])

    run_streams(test)


def test_a_stranger_is_not_listened_to(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.token_stream.inbox.CONNECT_TIMEOUT_S", 0.5)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        address = await inbox.address()
        inbox.open(RequestId("a"))
        forged = StreamAddress(address.host, address.port, "0" * len(address.secret))
        with pytest.raises(Unavailable):
            await outbox.submit(submitted("a"), forged)
        with pytest.raises(Unavailable):
            await inbox.attach(RequestId("a"), "w0")

    run_streams(test)


def test_a_front_end_that_cannot_be_reached_is_an_error() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        address = await inbox.address()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await outbox.submit(submitted("a"), StreamAddress(address.host, 1, address.secret))

    run_streams(test)


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
        await inbox.attach(RequestId("a"), await outbox.submit(submitted("a"), tapped))
        await wait_until(lambda: len(source.ticks) == 1)
        source.tick()
        assert [(await inbox.take(RequestId("a"))).token_ids for _ in range(2)] == [(), (0,)]
        assert address.secret.encode() not in heard
        assert bytes.fromhex(address.secret) not in heard
        assert b"cluster.types" not in heard, "no name of a class that the other side would make"

    run_streams(test)


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
            await outbox.submit(
                submitted("a"), StreamAddress("127.0.0.1", forger.sockets[0].getsockname()[1], "s3cret")
            )
        assert not source.ticks
        await wait_until(lambda: len(heard) == 64)

    run_streams(test)


@pytest.mark.parametrize("body", [pickle.dumps(("x", [])), b"", b"\x93\x01\x02\x03", b"\xff" * 100, b"\x91" * 5000])
def test_a_frame_that_is_none_of_ours_ends_its_connection_and_runs_nothing(body: bytes) -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a")
        link = next(iter(outbox._links.values()))
        write_frame(link.writer, body)
        with pytest.raises(WorkerLost, match="connection is gone"):
            await inbox.take(RequestId("a"))

    run_streams(test)


def test_a_front_end_that_stands_still_loses_its_sequences_and_no_more_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    """What it does not read is bounded: its connection ends, its sequences stop, and others do not notice."""
    monkeypatch.setattr(token_outbox, "UnsentBytes", partial(UnsentBytes, max_bytes=100_000))
    source = Source()

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        stalled = TokenInbox("127.0.0.1")
        stalled.open(RequestId("s"))
        await stalled.attach(RequestId("s"), await outbox.submit(submitted("s"), await stalled.address()))
        await start_streams(inbox, outbox, "a")
        await wait_until(lambda: len(source.ticks) == 2)
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

    run_streams(test, source)
