"""Tokens on their way from workers to front ends: order, frames, aborts, and either side's end. Real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

import actors.token_outbox as token_outbox
from actors.engine.progress import Progress
from actors.token_inbox import TokenInbox
from actors.token_outbox import TokenOutbox
from actors.token_stream import StreamAddress
from cluster.errors import Overloaded, Unavailable, WorkerLost
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
        await asyncio.sleep(0.1)
        source.tick()

        assert [(await inbox.take(RequestId("a"))).token_ids for _ in range(2)] == [(0,), (1,)]

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
    monkeypatch.setattr("actors.token_inbox.CONNECT_TIMEOUT_S", 0.5)

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
