"""The load client against a small server of our own: timings, usage and every way a request fails."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from cluster.cli.text_source import ServerSource, TextOptions, TextPiece
from cluster.errors import Unavailable
from cluster.loadgen.arrivals import closed_loop, poisson
from cluster.loadgen.client import LoadClient, LoadRequest, RequestTiming, run_load
from cluster.loadgen.sse import read_events

Handler = Callable[[dict[str, object], asyncio.StreamWriter], Awaitable[None]]


def _events(text: str) -> list[dict[str, object]]:
    async def chunks() -> AsyncIterator[bytes]:
        yield text.encode()

    async def collect() -> list[dict[str, object]]:
        return [event async for event in read_events(chunks())]

    return asyncio.run(collect())


def test_sse_reading() -> None:
    assert _events(': ping\n\ndata: {"a": 1}\n\nid: 3\ndata:{"b":\ndata: 2}\n\ndata: [DONE]\n\ndata: {"c": 3}\n\n') == [
        {"a": 1},
        {"b": 2},
    ]
    assert _events('data: {"a": 1}\n\ndata: [DONE]') == [{"a": 1}]
    for text in ('data: {"a": 1}\n\n', "data: nonsense\n\n", "data: 3\n\n"):
        with pytest.raises(Unavailable):
            _events(text)


def _run(handler: Handler, work: Callable[[LoadClient], Awaitable[object]], timeout_s: float = 5.0) -> object:
    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode().lower()
        length = int(head.split("content-length: ")[1].split("\r\n")[0])
        await handler(json.loads(await reader.readexactly(length)), writer)
        writer.close()

    async def run() -> object:
        server = await asyncio.start_server(serve, "127.0.0.1", 0)
        url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        async with server, LoadClient(url, model="m", timeout_s=timeout_s) as client:
            return await work(client)

    return asyncio.run(run())


async def _stream(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
    writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
    for _ in range(3):
        await asyncio.sleep(0.05)
        writer.write(b'data: {"choices": [{"text": "x"}]}\n\n')
        await writer.drain()
    usage = json.dumps({"choices": [], "usage": {"prompt_tokens": 4, "completion_tokens": body["max_tokens"]}})
    writer.write(f"data: {usage}\n\ndata: [DONE]\n\n".encode())


def test_timings_of_a_stream() -> None:
    timing = _run(_stream, lambda client: client.send(LoadRequest(prompt="a", max_tokens=9)))
    assert isinstance(timing, RequestTiming)
    assert timing.error is None
    assert timing.ttft_s is not None and 0.05 <= timing.ttft_s < 1.0
    assert len(timing.gaps_s) == 2 and min(timing.gaps_s) > 0.02
    assert timing.e2e_s >= 0.15
    assert (timing.prompt_tokens, timing.output_tokens) == (4, 9)


def test_line_separators_within_json_are_text_for_every_reader() -> None:
    said = "a\u2028b\x85c\vd"

    async def stream(_: dict[str, object], writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nConnection: close\r\n\r\n")
        event = json.dumps({"choices": [{"text": said, "finish_reason": "stop"}]}, ensure_ascii=False)
        writer.write(f"\ufeff: hello\rdata: {event}\r\rdata: [DONE]\r\r".encode())

    async def command_line(client: LoadClient) -> list[TextPiece]:
        source = ServerSource(client.url, model="m")
        return [piece async for piece in source.complete("a", TextOptions(max_tokens=9))]

    timing = _run(stream, lambda client: client.send(LoadRequest(prompt="a", max_tokens=9)))
    assert isinstance(timing, RequestTiming) and timing.error is None
    assert _run(stream, command_line) == [TextPiece(said, "stop")]


def test_failures_have_codes() -> None:
    async def busy(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b"HTTP/1.1 429 Too Many Requests\r\nContent-Length: 2\r\n\r\n{}")

    async def broken(_: object, writer: asyncio.StreamWriter) -> None:
        writer.write(b'HTTP/1.1 200 OK\r\nConnection: close\r\n\r\ndata: {"choices": []}\n\n')

    async def error_event(_: object, writer: asyncio.StreamWriter) -> None:
        event = b'data: {"error": {"code": null, "type": "server_error"}}\n\ndata: [DONE]\n\n'
        writer.write(b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\n" + event)

    async def gone(_: object, writer: asyncio.StreamWriter) -> None:
        writer.close()

    async def silent(_: object, writer: asyncio.StreamWriter) -> None:
        await asyncio.sleep(1.0)

    handlers: list[tuple[Handler, str]] = [
        (busy, "429"),
        (broken, "stream_broken"),
        (error_event, "server_error"),
        (gone, "connection"),
        (silent, "timeout"),
    ]
    for handler, code in handlers:
        timing = _run(handler, lambda client: client.send(LoadRequest(prompt="a", max_tokens=1)), timeout_s=0.4)
        assert isinstance(timing, RequestTiming)
        assert timing.error == code


def test_closed_loop_bounds_concurrency_and_open_loop_keeps_time() -> None:
    running = [0, 0]

    async def counted(body: dict[str, object], writer: asyncio.StreamWriter) -> None:
        running[0] += 1
        running[1] = max(running)
        await _stream(body, writer)
        running[0] -= 1

    requests = [LoadRequest(prompt="a", max_tokens=3)] * 6
    done: list[RequestTiming] = []

    async def closed(client: LoadClient) -> object:
        return await run_load(client, closed_loop(concurrency=2, num_requests=6), requests, on_done=done.append)

    timings, duration_s = _run(counted, closed)  # type: ignore[misc]
    assert [timing.error for timing in timings] == [None] * 6
    assert len(done) == 6
    assert running[1] == 2
    assert duration_s >= 0.45

    schedule = poisson(rate_per_s=20.0, num_requests=6, seed=1)
    _, duration_s = _run(_stream, lambda client: run_load(client, schedule, requests))  # type: ignore[misc]
    assert duration_s >= schedule.arrivals[-1].arrival_s + 0.15
