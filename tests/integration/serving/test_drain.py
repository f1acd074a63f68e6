"""The start and the end of a server: what runs is finished, nothing new is taken, nothing is left behind, and whoever
asks too early or too late is told to come again."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import grpc
import httpx
import openai
import pytest
from answer_watch import AnswerWatch
from google.rpc.error_details_pb2 import RetryInfo
from grpc_status import rpc_status
from live_server import LiveServer, launched, poll, processes_of

from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.ray

PROMPT = "Once upon a time"
OPERATOR = {"Authorization": "Bearer the-key-of-the-operators"}


@contextmanager
def half_sent_request(server: LiveServer) -> Iterator[socket.socket]:
    """A request that is in flight for as long as its last byte is not sent: however quick the machine is."""
    body = json.dumps({"model": "moesaic-demo", "prompt": PROMPT, "max_tokens": 3}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {len(body)}\r\n"
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        connection.sendall(f"{head}Content-Type: application/json\r\n\r\n".encode() + body[:-1])

        def num_in_flight() -> int:
            page = httpx.get(f"{server.url}/status", headers=OPERATOR, timeout=20)
            return page.json()["num_in_flight"] if page.status_code == 200 else 0  # or too busy to say

        poll(num_in_flight, deadline_s=30, what="the request is in flight")
        yield connection


def holders_of(server: LiveServer, secret: str) -> set[int]:
    """Processes of the server that have a secret in their environment or arguments."""
    found: set[int] = set()
    for process in processes_of(server.root):
        with contextlib.suppress(OSError):  # ended meanwhile
            facts = [Path(f"/proc/{process.pid}/{name}").read_bytes() for name in ("environ", "cmdline")]
            if any(secret.encode() in fact for fact in facts):
                found.add(process.pid)
    return found


def last_byte_answered(connection: socket.socket) -> bytes:
    """The whole answer."""
    connection.sendall(b"}")
    return b"".join(iter(lambda: connection.recv(65536), b""))


def refusal_by_grpc(server: LiveServer) -> tuple[grpc.StatusCode, bool]:
    """The status of a request, and whether it says when to come again. A channel of its own: one that has failed to
    connect waits before it tries again."""
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.SamplingOptions(max_tokens=1))
        try:
            GenerationServiceStub(channel).Generate(request, timeout=30)
        except grpc.RpcError as error:
            status = rpc_status.from_call(error)
            details = () if status is None else status.details
            return error.code(), any(detail.Is(RetryInfo.DESCRIPTOR) for detail in details)
    return grpc.StatusCode.OK, False


def test_interrupt_finishes_what_runs_and_every_refusal_says_to_come_again() -> None:
    key = OPERATOR["Authorization"].removeprefix("Bearer ")
    with launched(MOESAIC__FRONTEND__OPERATOR_KEY=key) as server, AnswerWatch(server.port) as watch:

        def is_refused_by_grpc() -> bool:
            code, has_retry_info = refusal_by_grpc(server)
            assert code in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.OK)
            assert code is not grpc.StatusCode.OK, "it was ready before its gateway refused anything"
            return has_retry_info

        poll(is_refused_by_grpc, deadline_s=120, what="gRPC refuses while the server starts")
        server.wait_ready()
        assert httpx.get(f"{server.url}/status", timeout=20).status_code == 401
        assert holders_of(server, key) == {server.process.pid}, "nobody inherits a key"
        with (
            half_sent_request(server) as held,
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
            grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
        ):
            stream = client.completions.create(
                model="moesaic-demo",
                prompt=PROMPT,
                max_tokens=400,
                stream=True,
                stream_options={"include_usage": True},
                extra_body={"ignore_eos": True},
            )
            next(iter(stream))
            stub = GenerationServiceStub(channel)
            sampling = pb.SamplingOptions(max_tokens=400, ignore_eos=True)
            request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling)
            grpc_stream = stub.GenerateStream(request, timeout=60)
            next(grpc_stream)

            os.killpg(server.process.pid, signal.SIGINT)  # Ctrl-C in a terminal goes to the whole group

            def refused() -> httpx.Response | None:
                body = {"model": "moesaic-demo", "prompt": "x", "max_tokens": 1}
                answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=30)
                return answer if answer.status_code != 200 else None

            answer = poll(refused, deadline_s=30, what="new requests are refused")
            assert answer is not None
            assert answer.status_code == 503
            assert int(answer.headers["retry-after"]) >= 1
            assert httpx.get(f"{server.url}/ready", timeout=20).json()["phase"] == "draining"
            assert refusal_by_grpc(server) == (grpc.StatusCode.UNAVAILABLE, True)
            *_, last = grpc_stream
            assert last.usage.completion_tokens == 400
            usages = [chunk.usage for chunk in stream if chunk.usage is not None]
            assert usages[-1].completion_tokens == 400
            assert last_byte_answered(held).startswith(b"HTTP/1.1 200 ")
        server.assert_ends(0)
    watch.assert_all_ours()
    assert {path for path, answer in watch.answers if answer.status_code == 503} == {
        "/v1/completions",
        "/v1/models",
        "/ready",
    }
