"""gRPC against a real server: the same answers as over HTTP, and a gateway that comes back."""

from __future__ import annotations

from collections.abc import Iterator

import grpc
import httpx
import openai
import psutil
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from live_server import LiveServer, poll, processes_of

from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub

pytestmark = pytest.mark.ray

PROMPT = "Once upon a time"
BACK_DEADLINE_S = 60
TIMEOUT_S = 120


@pytest.fixture
def channel(server: LiveServer) -> Iterator[grpc.Channel]:
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as connected:
        yield connected


def _gateway_process(server: LiveServer) -> psutil.Process | None:
    return next((process for process in processes_of(server.root) if "GrpcGateway" in "".join(process.cmdline())), None)


def _is_ready(server: LiveServer) -> bool:
    # A channel of its own: one that has failed waits before it connects again.
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = health_pb2.HealthCheckRequest(service="moesaic.v1.GenerationService")
        try:
            answer = health_pb2_grpc.HealthStub(channel).Check(request, timeout=5)
        except grpc.RpcError:
            return False
        return answer.status == health_pb2.HealthCheckResponse.SERVING


def test_grpc_gives_the_tokens_of_http(channel: grpc.Channel, client: openai.OpenAI) -> None:
    stub = GenerationServiceStub(channel)
    sampling = pb.SamplingOptions(max_tokens=24, seed=7, n=2, num_logprobs=1)
    prompt = pb.Prompt(text=PROMPT)

    whole = stub.Generate(pb.GenerateRequest(prompt=prompt, sampling=sampling), timeout=TIMEOUT_S)
    pieces = list(stub.GenerateStream(pb.GenerateStreamRequest(prompt=prompt, sampling=sampling), timeout=TIMEOUT_S))
    http = client.completions.create(
        model="moesaic-demo", prompt=PROMPT, max_tokens=24, temperature=1, seed=7, n=2, logprobs=1
    )

    assert http.usage is not None
    assert len({choice.text for choice in http.choices}) == 2, "the choices differ"
    for expected, choice in zip(sorted(http.choices, key=lambda choice: choice.index), whole.choices, strict=True):
        assert expected.logprobs is not None
        assert choice.text == expected.text
        told = [entry.chosen.logprob for entry in choice.logprobs]
        assert told == pytest.approx(expected.logprobs.token_logprobs, abs=1e-3), "as other rows shared their batches"
        mine = [piece for piece in pieces if piece.index == choice.index]
        assert "".join(piece.text for piece in mine) == choice.text
        assert [token_id for piece in mine for token_id in piece.token_ids] == list(choice.token_ids)
        assert mine[-1].finish_reason == choice.finish_reason
    assert whole.usage.prompt_tokens == http.usage.prompt_tokens
    assert whole.usage.completion_tokens == http.usage.completion_tokens


def test_a_cancelled_call_frees_the_worker(channel: grpc.Channel, server: LiveServer) -> None:
    sampling = pb.SamplingOptions(max_tokens=1500, ignore_eos=True)
    stream = GenerationServiceStub(channel).GenerateStream(
        pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling), timeout=TIMEOUT_S
    )
    next(stream)
    assert server.worker()["num_running"] == 1

    stream.cancel()

    poll(lambda: server.worker()["num_running"] == 0, deadline_s=30, what="the worker is idle")


def test_a_killed_gateway_comes_back(server: LiveServer) -> None:
    victim = _gateway_process(server)
    assert victim is not None
    assert _is_ready(server)

    victim.kill()

    victim.wait(10)
    poll(lambda: _is_ready(server), deadline_s=BACK_DEADLINE_S, what=lambda: f"gRPC answers; log:\n{server.log}")
    with grpc.insecure_channel(f"127.0.0.1:{server.grpc_port}") as channel:
        request = pb.GenerateRequest(prompt=pb.Prompt(text=PROMPT), sampling=pb.SamplingOptions(max_tokens=4))
        assert GenerationServiceStub(channel).Generate(request, timeout=TIMEOUT_S).usage.completion_tokens == 4
    assert server.get("/ready")["phase"] == "ready", "HTTP did not notice"


def test_an_answer_over_grpc_is_aborted_over_http(channel: grpc.Channel, server: LiveServer) -> None:
    sampling = pb.SamplingOptions(max_tokens=1500, n=2, ignore_eos=True)
    request = pb.GenerateStreamRequest(prompt=pb.Prompt(text=PROMPT), sampling=sampling)
    metadata = (("x-request-id", "grpc-to-be-aborted"),)
    stream = GenerationServiceStub(channel).GenerateStream(request, metadata=metadata, timeout=TIMEOUT_S)
    first = next(stream)

    names = {"request_ids": ["nobody", "grpc-to-be-aborted"]}
    answer = httpx.post(f"{server.url}/abort_requests", json=names, timeout=30)

    assert answer.json() == {"aborted": ["grpc-to-be-aborted"]}
    reasons = [piece.finish_reason for piece in (first, *stream) if piece.finish_reason]
    assert reasons == [pb.FINISH_REASON_ABORT] * 2
    poll(lambda: server.worker()["num_running"] == 0, deadline_s=10, what="the sequences stop")
    assert server.worker()["kv_blocks_used"] == 0
