"""The end of a server: what runs is finished, nothing new is taken, nothing is left behind."""

from __future__ import annotations

import os
import signal

import grpc
import httpx
import openai
import pytest
from live_server import poll, running_server

from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.ray


def test_interrupt_finishes_the_stream_and_refuses_new_requests() -> None:
    with (
        running_server() as server,
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client,
        grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel,
    ):
        stream = client.completions.create(
            model="moesaic-demo",
            prompt="Once upon a time",
            max_tokens=400,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        stub = GenerationServiceStub(channel)
        prompt, sampling = pb.Prompt(text="Once upon a time"), pb.SamplingOptions(max_tokens=400, ignore_eos=True)
        grpc_stream = stub.GenerateStream(pb.GenerateStreamRequest(prompt=prompt, sampling=sampling), timeout=60)
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
        with pytest.raises(grpc.RpcError) as refused_by_grpc:
            stub.Generate(pb.GenerateRequest(prompt=prompt), timeout=30)
        assert refused_by_grpc.value.code() is grpc.StatusCode.UNAVAILABLE
        *_, last = grpc_stream
        assert last.usage.completion_tokens == 400
        usages = [chunk.usage for chunk in stream if chunk.usage is not None]
        assert usages[-1].completion_tokens == 400
        server.assert_ends(0)
