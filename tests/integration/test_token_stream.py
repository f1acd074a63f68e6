"""Tokens on their way from workers to front ends: order, frames, aborts, and either side's end. Real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from actors.token_stream import StreamAddress, TokenInbox, TokenOutbox
from cluster.errors import Overloaded, Unavailable
from cluster.types import FinishReason, GenerationRequest, RequestId, SamplingParams, TokenChunk

DEADLINE_S = 10.0


class Source:
    """Stands in for a worker's engine: emits 0, 1, 2, ... one per `tick`, to all sequences at once."""

    def __init__(self, length: int = 1_000_000) -> None:
        self.length = length
        self.ticks: dict[RequestId, asyncio.Queue[int]] = {}
        self.ended: list[RequestId] = []
        self.error: Exception | None = None

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
            await test(TokenInbox("127.0.0.1"), TokenOutbox("w0", used.generate), used)

    asyncio.run(run())


async def _start(inbox: TokenInbox, outbox: TokenOutbox, *names: str) -> None:
    for name in names:
        inbox.open(RequestId(name))
        worker = await outbox.submit(_request(name), await inbox.address())
        await inbox.attach(RequestId(name), worker)


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
    import actors.token_stream as token_stream

    frames: list[object] = []
    write = token_stream._write
    monkeypatch.setattr(token_stream, "_write", lambda writer, value: (frames.append(value), write(writer, value)))

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


def test_a_client_that_left_during_submission_is_stopped_at_its_first_token() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        inbox.open(RequestId("a"))
        address = await inbox.address()
        inbox.close(RequestId("a"), abort=True)
        await outbox.submit(_request("a"), address)
        await _until(lambda: len(source.ticks) == 1)
        source.tick()
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


def test_a_lost_worker_ends_its_streams() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a")
        for link in outbox._links.values():
            link.writer.transport.abort()
        with pytest.raises(Unavailable, match="lost"):
            await inbox.take(RequestId("a"))
        await _until(lambda: source.ended == ["a"])

    _run(test)


def test_a_lost_front_end_stops_what_streamed_to_it() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await _start(inbox, outbox, "a", "b")
        await _until(lambda: len(source.ticks) == 2)
        for writer in list(inbox._workers.values()):
            writer.transport.abort()
        await _until(lambda: sorted(source.ended) == ["a", "b"])

    _run(test)


def test_a_stranger_is_not_listened_to() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        address = await inbox.address()
        inbox.open(RequestId("a"))
        forged = StreamAddress(address.host, address.port, "0" * len(address.secret))
        worker = await outbox.submit(_request("a"), forged)
        with pytest.raises(Unavailable):
            await inbox.attach(RequestId("a"), worker)

    _run(test)


def test_a_front_end_that_cannot_be_reached_is_an_error() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        address = await inbox.address()
        with pytest.raises(Unavailable, match="cannot be reached"):
            await outbox.submit(_request("a"), StreamAddress(address.host, 1, address.secret))

    _run(test)
