"""A scripted source of tokens between an inbox and an outbox, over real sockets."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable

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


def submitted(name: str) -> GenerationRequest:
    return GenerationRequest(request_id=RequestId(name), prompt_ids=(1,), sampling=SamplingParams(max_tokens=5))


def run_streams(
    test: Callable[[TokenInbox, TokenOutbox, Source], Awaitable[None]], source: Source | None = None
) -> None:
    async def run() -> None:
        used = source or Source()
        async with asyncio.timeout(DEADLINE_S):
            await test(TokenInbox("127.0.0.1"), TokenOutbox("w0", used.generate, lambda: used.progress), used)

    asyncio.run(run())


async def start_streams(inbox: TokenInbox, outbox: TokenOutbox, *names: str) -> None:
    """Submitted, and the worker has said that it has them."""
    for name in names:
        inbox.open(RequestId(name))
        worker = await outbox.submit(submitted(name), await inbox.address())
        await inbox.attach(RequestId(name), worker)
        assert (await inbox.take(RequestId(name))).token_ids == ()


async def wait_until(condition: Callable[[], bool]) -> None:
    while not condition():
        await asyncio.sleep(0.005)
