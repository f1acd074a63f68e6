"""A front end's client of several workers, over real sockets and without Ray: who goes on when one does not.

Workers are scripts: each emits 10, 11, 12, ... by the place of the token, as the real one does under one seed.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from functools import partial
from types import SimpleNamespace
from typing import Any

import pytest

import actors.ray_shells.worker_client as worker_client
from actors.ray_shells.worker_client import ServeWorkerClient
from cluster.application import ApplicationId
from cluster.errors import InvalidRequest, MoesaicError, Overloaded, Unavailable
from cluster.routing.failover_gate import FailoverGate
from cluster.token_stream.frames import StreamAddress
from cluster.token_stream.outbox import TokenOutbox
from cluster.token_stream.progress import Progress
from cluster.types import FinishReason, GenerationRequest, RequestId, SamplingParams, TokenChunk

DEADLINE_S = 20.0
NUM_TOKENS = 6


class Worker:
    """One worker. `pause_after` tokens of a sequence it stands still until it is killed or `resume` is set."""

    def __init__(self, name: str, *, pause_after: int | None = None, refuse: MoesaicError | None = None) -> None:
        self.name = name
        self.pause_after = pause_after
        self.refuse = refuse
        self.requests: list[GenerationRequest] = []
        self.running: set[RequestId] = set()
        self.resume = asyncio.Event()
        self.paused = asyncio.Event()
        self.progress = Progress()
        self.outbox = TokenOutbox(name, self.generate, lambda: self.progress)

    async def submit(self, request: GenerationRequest, address: StreamAddress) -> str:
        self.requests.append(request)
        if self.refuse is not None:
            raise self.refuse
        return await self.outbox.submit(request, address)

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        self.running.add(request.request_id)
        try:
            for place in range(len(request.emitted_ids), request.sampling.max_tokens):
                if place == self.pause_after:
                    self.paused.set()
                    await self.resume.wait()
                last = place == request.sampling.max_tokens - 1
                yield TokenChunk(token_ids=(10 + place,), finish_reason=FinishReason.LENGTH if last else None)
                await asyncio.sleep(0)
        finally:
            self.running.discard(request.request_id)

    def kill(self) -> None:
        for link in self.outbox._links.values():
            link.writer.transport.abort()


class Handle:
    """A Serve handle: the first worker that the request does not avoid; calls go on in turn, as Serve's do."""

    def __init__(self, *workers: Worker) -> None:
        self.workers = list(workers)
        self.submit = SimpleNamespace(remote=self._submit)

    async def _submit(self, request: GenerationRequest, address: StreamAddress) -> str:
        order = sorted(self.workers, key=lambda worker: worker.name in request.avoid)
        return await order[min(request.attempt, len(order) - 1) if not request.avoid else 0].submit(request, address)


@pytest.fixture(autouse=True)
def this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_client.ray.util, "get_node_ip_address", lambda: "127.0.0.1")


def _request(name: str = "a", **fields: Any) -> GenerationRequest:
    sampling = SamplingParams(max_tokens=NUM_TOKENS)
    return GenerationRequest(request_id=RequestId(name), prompt_ids=(1, 2), sampling=sampling, **fields)


def _run(test: Callable[[], Awaitable[None]]) -> None:
    async def run() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(run())


def _client(*workers: Worker) -> ServeWorkerClient:
    handle: Any = Handle(*workers)
    return ServeWorkerClient(handle, application=ApplicationId("test", "moesaic"))


async def _tokens(client: ServeWorkerClient, request: GenerationRequest) -> list[int]:
    return [token_id async for chunk in client.generate(request) for token_id in chunk.token_ids]


EXPECTED = [10 + place for place in range(NUM_TOKENS)]


def test_a_worker_that_dies_in_the_middle_is_not_noticed() -> None:
    async def test() -> None:
        first, second = Worker("w1", pause_after=3), Worker("w2")
        stream = asyncio.create_task(_tokens(_client(first, second), _request()))
        await first.paused.wait()
        first.kill()

        assert await stream == EXPECTED
        (resumed,) = second.requests
        assert (resumed.emitted_ids, resumed.attempt, resumed.avoid) == ((10, 11, 12), 1, ("w1",))

    _run(test)


def test_a_worker_that_stands_still_is_left_and_its_late_tokens_are_dropped() -> None:
    async def test() -> None:
        first, second = Worker("w1", pause_after=2), Worker("w2", pause_after=4)
        stream = asyncio.create_task(_tokens(_client(first, second), _request()))
        await first.paused.wait()
        first.progress = Progress(stalled_s=3.0, allowed_s=2.0)
        await second.paused.wait()
        first.resume.set()  # it would go on now
        while first.running:
            await asyncio.sleep(0.01)
        second.resume.set()

        assert await stream == EXPECTED

    _run(test)


def test_abort_reaches_the_attempt_that_runs() -> None:
    async def test() -> None:
        first, second = Worker("w1", pause_after=2), Worker("w2", pause_after=4)
        client = _client(first, second)
        stream = asyncio.create_task(_tokens(client, _request()))
        await first.paused.wait()
        first.kill()
        await second.paused.wait()
        assert second.running == {"a+1"}

        await client.abort(RequestId("a"))

        while second.running or first.running:
            await asyncio.sleep(0.01)
        stream.cancel()

    _run(test)


def _passing(tasks: set[asyncio.Task[Any]]) -> list[asyncio.Task[Any]]:
    """Those that belong to one request; the inbox's own watch stays."""
    return [task for task in tasks if "TokenInbox._watch" not in repr(task.get_coro())]


def test_a_client_that_leaves_while_nobody_has_its_sequence_leaves_nothing_behind() -> None:
    async def test() -> None:
        worker = Worker("w1", refuse=Unavailable("the worker is loading"))
        client, before = _client(worker), asyncio.all_tasks()
        stream = asyncio.create_task(_tokens(client, _request()))
        while not worker.requests:
            await asyncio.sleep(0.01)
        stream.cancel()
        await asyncio.gather(stream, return_exceptions=True)
        worker.refuse = None
        num_requests = len(worker.requests)
        async with asyncio.timeout(10):
            while _passing(asyncio.all_tasks() - before):  # with these, nothing is left that could ask again
                await asyncio.sleep(0.01)

        assert len(worker.requests) == num_requests and not worker.running
        assert not client._running and not client._inbox._mailboxes

    _run(test)


def test_a_worker_that_is_not_ready_is_passed_over() -> None:
    async def test() -> None:
        loading, ready = Worker("w1", refuse=Unavailable("the worker is loading")), Worker("w2")
        assert await _tokens(_client(loading, ready), _request()) == EXPECTED

    _run(test)


def test_a_worker_that_comes_back_within_the_patience_gets_it() -> None:
    async def test() -> None:
        worker = Worker("w1", refuse=Unavailable("the worker is loading"))
        stream = asyncio.create_task(_tokens(_client(worker), _request()))
        while len(worker.requests) < 3:
            await asyncio.sleep(0.01)
        worker.refuse = None

        assert await stream == EXPECTED

    _run(test)


@pytest.mark.parametrize("error", [Overloaded("the queue is full"), InvalidRequest("the prompt is empty")])
def test_a_refusal_with_a_reason_passes(error: MoesaicError) -> None:
    async def test() -> None:
        first, second = Worker("w1", refuse=error), Worker("w2")
        with pytest.raises(type(error), match=error.message):
            await _tokens(_client(first, second), _request())
        assert not second.requests

    _run(test)


def test_a_request_that_takes_two_workers_down_spares_the_third() -> None:
    async def test() -> None:
        workers = [Worker(f"w{i}", pause_after=0) for i in range(3)]
        stream = asyncio.create_task(_tokens(_client(*workers), _request()))
        for worker in workers[:2]:
            await worker.paused.wait()
            worker.kill()
        with pytest.raises(MoesaicError, match="2 attention workers in a row"):
            await stream
        assert not workers[2].requests

    _run(test)


def test_many_that_lose_their_worker_come_back_in_order_a_few_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """The second worker takes each only after a while: never do more than the allowed number ask it at once."""
    monkeypatch.setattr(worker_client, "FailoverGate", partial(FailoverGate, at_once=3))
    asking = 0
    most = 0
    order: list[str] = []

    class Slow(Worker):
        async def submit(self, request: GenerationRequest, address: StreamAddress) -> str:
            nonlocal asking, most
            asking += 1
            most = max(most, asking)
            order.append(request.request_id.partition("+")[0])
            try:
                await asyncio.sleep(0.01)
                return await super().submit(request, address)
            finally:
                asking -= 1

    async def test() -> None:
        dying, other = Worker("w0", pause_after=2), Slow("w1")
        client = ServeWorkerClient(Handle(dying, other), application=ApplicationId("test", "moesaic"))  # type: ignore[arg-type]

        async def whole(name: str) -> list[int]:
            sampling = SamplingParams(max_tokens=NUM_TOKENS, ignore_eos=True)
            request = GenerationRequest(request_id=RequestId(name), prompt_ids=(1,), sampling=sampling)
            return [token for chunk in [c async for c in client.generate(request)] for token in chunk.token_ids]

        tasks = []
        for i in range(20):
            tasks.append(asyncio.create_task(whole(f"r{i:02}")))
            while len(dying.running) <= i:
                await asyncio.sleep(0.001)
        dying.kill()
        answers = await asyncio.gather(*tasks)
        assert answers == [[10 + i for i in range(NUM_TOKENS)]] * 20

    async def bounded() -> None:
        async with asyncio.timeout(DEADLINE_S):
            await test()

    asyncio.run(bounded())
    assert most <= 3
    assert order == sorted(order)
    assert len(order) == 20


def test_turns_go_by_order_and_none_is_lost() -> None:
    async def test() -> None:
        gate = FailoverGate(at_once=1, longest_wait_s=0.3)
        await gate.enter(0)
        came: list[int] = []

        async def enter(order: int) -> None:
            await gate.enter(order)
            came.append(order)

        tasks = {order: asyncio.create_task(enter(order)) for order in (5, 3, 9, 1)}
        await asyncio.sleep(0)
        tasks[3].cancel()  # its client left
        for _ in range(2):
            gate.leave()
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        assert came == [1, 5]
        with pytest.raises(Unavailable, match="wait to be given"):
            await tasks[9]
        gate.leave()
        await asyncio.wait_for(gate.enter(7), 1)

    asyncio.run(test())
