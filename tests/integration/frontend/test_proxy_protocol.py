"""Clients that offer HTTP/2 with their first request, as those of the JDK do, against a real socket."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import pytest
import uvicorn
from live_server import free_port
from starlette.applications import Starlette
from starlette.responses import PlainTextResponse
from starlette.routing import Route

from cluster.frontend.serve_proxy.answers import middlewares
from cluster.frontend.serve_proxy.request_id import OneRequestId

DEADLINE_S = 20
OFFER = b"Connection: %s\r\nUpgrade: h2c\r\nHTTP2-Settings: AAMAAABkAAQAoAAAAAIAAAAA\r\n"


async def _echo(request):
    body = await request.body()
    headers = ",".join(sorted(name for name in request.headers if "upgrade" in name or "http2" in name))
    return PlainTextResponse(f"{request.method} {body.decode()} [{headers}]", headers={"x-request-id": "own"})


@asynccontextmanager
async def _serving(monkeypatch):
    monkeypatch.setattr(uvicorn.config, "HTTP_PROTOCOLS", dict(uvicorn.config.HTTP_PROTOCOLS))
    middlewares()  # what a Serve proxy calls
    port = free_port()
    app = OneRequestId(Starlette(routes=[Route("/", _echo, methods=["GET", "POST"])]))
    server = uvicorn.Server(uvicorn.Config(app, port=port, log_level="critical", lifespan="off"))
    task = asyncio.create_task(server.serve())
    try:
        while not server.started:
            await asyncio.sleep(0.01)
        yield port
    finally:
        server.should_exit = True
        await task


async def _read_answer(reader):
    head = await reader.readuntil(b"\r\n\r\n")
    length = next(line for line in head.lower().split(b"\r\n") if line.startswith(b"content-length:"))
    return head, (await reader.readexactly(int(length.split(b":")[1]))).decode()


@pytest.mark.parametrize("connection", [b"Upgrade, HTTP2-Settings", b"HTTP2-Settings,upgrade", b"keep-alive, Upgrade"])
@pytest.mark.parametrize("cut", [None, 10, 60, -5, -2])
def test_the_body_of_a_request_that_offers_http2_is_read(monkeypatch, connection, cut):
    post = b"POST / HTTP/1.1\r\nHost: x\r\n" + OFFER % connection + b"Content-Length: 5\r\n\r\nhello"
    chunked = b"POST / HTTP/1.1\r\nHost: x\r\n" + OFFER % connection + b"Transfer-Encoding: chunked\r\n\r\n"
    chunked += b"2\r\nhe\r\n3\r\nllo\r\n0\r\n\r\n"
    get = b"GET / HTTP/1.1\r\nHost: x\r\n" + OFFER % connection + b"\r\n"
    plain = b"POST / HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nhello"

    async def scenario():
        async with asyncio.timeout(DEADLINE_S), _serving(monkeypatch) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            answers = []
            for request in (post, chunked, get, plain, post):  # on one connection
                writer.write(request[:cut])
                if cut is not None:
                    await writer.drain()
                    await asyncio.sleep(0.02)  # so that it arrives in two pieces
                    writer.write(request[cut:])
                answers.append((await _read_answer(reader))[1])
            writer.close()
            return answers

    assert asyncio.run(scenario()) == ["POST hello []", "POST hello []", "GET  []", "POST hello []", "POST hello []"]


def test_several_requests_in_one_packet(monkeypatch):
    post = b"POST / HTTP/1.1\r\nHost: x\r\n" + OFFER % b"Upgrade, HTTP2-Settings" + b"Content-Length: 5\r\n\r\nhello"

    async def scenario():
        async with asyncio.timeout(DEADLINE_S), _serving(monkeypatch) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post * 3)
            answers = [(await _read_answer(reader))[1] for _ in range(3)]
            writer.close()
            return answers

    assert asyncio.run(scenario()) == ["POST hello []"] * 3


@pytest.mark.parametrize(("given", "kept"), [(b"mine", True), (b"two words", False), (b"x" * 500, False)])
def test_an_answer_has_one_request_id(monkeypatch, given, kept):
    async def scenario():
        async with asyncio.timeout(DEADLINE_S), _serving(monkeypatch) as port:
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\nX-Request-Id: " + given + b"\r\n\r\n")
            head, _ = await _read_answer(reader)
            writer.close()
            return [line.split(b": ")[1] for line in head.split(b"\r\n") if line.lower().startswith(b"x-request-id")]

    (request_id,) = asyncio.run(scenario())
    assert (request_id == given) is kept
    assert request_id.isalnum() or kept
