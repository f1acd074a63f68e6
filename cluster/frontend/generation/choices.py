"""Several sequences of one request as one stream. Knows asyncio; knows no shapes and no HTTP."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from cluster.frontend.generation.sequence import TextChunk


async def interleave(streams: Sequence[AsyncGenerator[TextChunk]]) -> AsyncGenerator[tuple[int, TextChunk]]:
    """Chunks of all streams as they come, with the index of their stream.

    The first error ends all of them. Closing this iterator closes them too.
    """
    if len(streams) == 1:
        try:
            async for chunk in streams[0]:
                yield 0, chunk
        finally:
            await streams[0].aclose()
        return
    queue: asyncio.Queue[tuple[int, TextChunk | Exception | None]] = asyncio.Queue(maxsize=2 * len(streams))
    tasks = [asyncio.create_task(_feed(queue, index, stream)) for index, stream in enumerate(streams)]
    try:
        num_open = len(streams)
        while num_open:
            index, item = await queue.get()
            if isinstance(item, Exception):
                raise item
            if item is None:
                num_open -= 1
            else:
                yield index, item
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for stream in streams:  # a task cancelled before its first step has not closed its stream
            await stream.aclose()


async def _feed(
    queue: asyncio.Queue[tuple[int, TextChunk | Exception | None]], index: int, stream: AsyncGenerator[TextChunk]
) -> None:
    try:
        async for chunk in stream:
            await queue.put((index, chunk))
    except Exception as error:  # noqa: BLE001 - handed to the reader, which raises it
        await queue.put((index, error))
    else:
        await queue.put((index, None))
    finally:
        await stream.aclose()
