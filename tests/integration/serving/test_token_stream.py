"""Tokens on their way from workers to front ends: order, frames, aborts, and either side's end. Real sockets."""

from __future__ import annotations

import asyncio

import pytest
from token_sources import DEADLINE_S, Source, run_streams, start_streams, submitted, wait_until

import cluster.token_stream.outbox as token_outbox
from cluster.errors import Overloaded, Unavailable, WorkerLost
from cluster.token_stream.inbox import TokenInbox
from cluster.token_stream.outbox import TokenOutbox
from cluster.token_stream.progress import Progress
from cluster.types import FinishReason, RequestId


def test_chunks_of_several_sequences_arrive_in_order_and_end() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a", "b")
        await wait_until(lambda: len(source.ticks) == 2)
        for _ in range(3):
            source.tick()
        for name in ("a", "b"):
            chunks = [await inbox.take(RequestId(name)) for _ in range(3)]
            assert [chunk.token_ids for chunk in chunks] == [(0,), (1,), (2,)]
            assert chunks[-1].finish_reason is FinishReason.LENGTH

    run_streams(test, Source(length=3))


def test_one_step_is_one_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    frames: list[object] = []
    write = token_outbox.write_frame
    monkeypatch.setattr(token_outbox, "write_frame", lambda writer, value: (frames.append(value), write(writer, value)))
    monkeypatch.setattr(token_outbox, "HEARTBEAT_S", DEADLINE_S)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        names = [f"r{i}" for i in range(8)]
        await start_streams(inbox, outbox, *names)
        await wait_until(lambda: len(source.ticks) == 8)
        frames.clear()
        source.tick()
        for name in names:
            await inbox.take(RequestId(name))
        assert len(frames) == 1

    run_streams(test)


def test_closing_a_stream_stops_its_sequence_and_no_other() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a", "b")
        await wait_until(lambda: len(source.ticks) == 2)
        inbox.close(RequestId("a"), abort=True)
        await wait_until(lambda: source.ended == ["a"])
        source.tick()
        assert (await inbox.take(RequestId("b"))).token_ids == (0,)

    run_streams(test)


def test_a_client_that_left_during_submission_is_stopped_before_its_first_token() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        inbox.open(RequestId("a"))
        address = await inbox.address()
        inbox.close(RequestId("a"), abort=True)
        await outbox.submit(submitted("a"), address)
        await wait_until(lambda: source.ended == ["a"])

    run_streams(test)


def test_errors_of_the_worker_reach_the_stream() -> None:
    source = Source()
    source.error = Overloaded("the queue is full", param="x")

    async def test(inbox: TokenInbox, outbox: TokenOutbox, _: Source) -> None:
        await start_streams(inbox, outbox, "a")
        with pytest.raises(Overloaded, match="the queue is full") as caught:
            await inbox.take(RequestId("a"))
        assert caught.value.param == "x"

    run_streams(test, source)


def test_a_lost_worker_ends_its_streams_after_what_it_said() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a")
        await wait_until(lambda: len(source.ticks) == 1)
        source.tick()
        await wait_until(lambda: not inbox._mailboxes[RequestId("a")].items.empty())
        for link in outbox._links.values():
            link.writer.transport.abort()
        await wait_until(lambda: inbox.lost == {"w0"})
        assert (await inbox.take(RequestId("a"))).token_ids == (0,)
        with pytest.raises(WorkerLost, match="connection is gone"):
            await inbox.take(RequestId("a"))
        await wait_until(lambda: source.ended == ["a"])

    run_streams(test)


def test_a_silent_worker_has_lost_its_sequences_and_is_told_so_when_it_is_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_outbox, "HEARTBEAT_S", DEADLINE_S)  # as if its event loop stood still
    source = Source()
    source.progress = Progress(silence_s=0.3)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a")
        with pytest.raises(WorkerLost, match="said nothing for"):
            await inbox.take(RequestId("a"))
        assert inbox.lost == {"w0"}

        inbox.close(RequestId("a"), abort=True)  # the front end gives the sequence to another worker
        await wait_until(lambda: source.ended == ["a"])

    run_streams(test, source)


def test_a_worker_that_says_that_it_stands_still_has_lost_its_sequences() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a")
        source.progress = Progress(stalled_s=9.0, allowed_s=2.0)
        with pytest.raises(WorkerLost, match="no progress for 9"):
            await inbox.take(RequestId("a"))
        inbox.open(RequestId("b"))
        worker = await outbox.submit(submitted("b"), await inbox.address())
        with pytest.raises(Unavailable, match="no progress"):
            await inbox.attach(RequestId("b"), worker)

        source.progress = Progress()
        await wait_until(lambda: not inbox.lost)

    run_streams(test)


def test_a_waiting_worker_with_signs_of_life_keeps_its_sequences(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(token_outbox, "HEARTBEAT_S", 0.1)
    source = Source()
    source.progress = Progress(stalled_s=5.0, allowed_s=30.0, silence_s=0.5)

    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a")
        with pytest.raises(TimeoutError):
            await asyncio.wait_for(inbox.take(RequestId("a")), 1.2)
        assert not inbox.lost

    run_streams(test, source)


def test_late_tokens_of_a_sequence_that_another_worker_has_are_nobodys() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a")
        await wait_until(lambda: len(source.ticks) == 1)
        inbox._mailboxes.pop(RequestId("a"))  # given up, and the abort did not get through
        inbox.open(RequestId("a+1"))
        source.tick()
        await wait_until(lambda: source.ended == ["a"])
        assert inbox._mailboxes[RequestId("a+1")].items.empty()

    run_streams(test)


def test_of_two_workers_that_got_one_submission_only_the_one_that_answered_for_it_is_heard() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        other = Source()
        inbox.open(RequestId("a"))
        await TokenOutbox("w1", other.generate).submit(submitted("a"), await inbox.address())
        worker = await outbox.submit(submitted("a"), await inbox.address())
        await wait_until(lambda: len(other.ticks) == len(source.ticks) == 1)
        other.tick()  # sooner than the answer that says who has it
        source.tick()
        await asyncio.sleep(0.1)
        await inbox.attach(RequestId("a"), worker)
        await wait_until(lambda: other.ended == ["a"])
        source.tick()

        assert [(await inbox.take(RequestId("a"))).token_ids for _ in range(3)] == [(), (0,), (1,)]
        assert source.ended == []

    run_streams(test)


def test_a_submission_that_comes_twice_runs_once() -> None:
    async def test(inbox: TokenInbox, outbox: TokenOutbox, source: Source) -> None:
        await start_streams(inbox, outbox, "a")
        await wait_until(lambda: len(source.ticks) == 1)
        source.tick()
        await outbox.submit(submitted("a"), await inbox.address())
        await start_streams(inbox, outbox, "b")
        await wait_until(lambda: len(source.ticks) >= 2)  # begun after the second "a" would have been
        source.tick()

        assert [(await inbox.take(RequestId("a"))).token_ids for _ in range(2)] == [(0,), (1,)]
        assert len(source.ticks) == 2

    run_streams(test)
