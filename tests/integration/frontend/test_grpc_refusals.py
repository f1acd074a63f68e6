"""What the gRPC server refuses, and with which code and details: fields, sizes, keys, unknown names."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fakes import FakeAttentionWorker
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_calls import SERVING, failure, long_request, prompt, rich_failure
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.errors import InvalidOutput, Overloaded
from cluster.frontend.grpc_api.server import SERVICES
from cluster.rpc import cluster_pb2, cluster_pb2_grpc
from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub


def test_wrong_fields_are_named(serve, run):
    worker = FakeAttentionWorker()
    cases = [
        (pb.GenerateRequest(prompt=prompt(), sampling=pb.SamplingOptions(temperature=9)), "sampling.temperature"),
        (pb.GenerateRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=9999)), "sampling.max_tokens"),
        (pb.GenerateRequest(prompt=pb.Prompt(token_ids=pb.TokenIds(ids=[10**6]))), "prompt.token_ids"),
        (pb.GenerateRequest(prompt=prompt("")), "prompt.text"),
        (pb.GenerateRequest(), "prompt"),
    ]

    async def scenario():
        async with serve(worker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stub = GenerationServiceStub(channel)
            return [await rich_failure(stub.Generate(request)) for request, _ in cases]

    for (error, details), (_, path) in zip(run(scenario), cases, strict=True):
        assert error.code() is grpc.StatusCode.INVALID_ARGUMENT
        assert details[BadRequest].field_violations[0].field == path
        assert details[ErrorInfo].domain == "moesaic"
        assert dict(error.trailing_metadata())["x-request-id"].isalnum()
    assert worker.requests == []


def test_refusals_have_their_codes(serve, run):
    worker = FakeAttentionWorker(fail_with=Overloaded("the queue is full"))

    async def scenario():
        async with serve(worker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stub = GenerationServiceStub(channel)
            full = await rich_failure(stub.Generate(pb.GenerateRequest(prompt=prompt())))
            model = await rich_failure(stub.Generate(pb.GenerateRequest(model="other", prompt=prompt())))
            worker.fail_with = InvalidOutput("not finite from expert 3 of layer 1 on")
            unsound = await rich_failure(stub.Generate(pb.GenerateRequest(prompt=prompt())))
            worker.fail_with = KeyError("secret")
            bug = await rich_failure(stub.Generate(pb.GenerateRequest(prompt=prompt())))
            unknown = await failure(channel.unary_unary("/moesaic.v1.GenerationService/Dance")(b""))
            return full, model, unsound, bug, unknown

    full, model, unsound, bug, unknown = run(scenario)
    assert full[0].code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert full[1][RetryInfo].retry_delay.ToMilliseconds() == 1000
    assert model[0].code() is grpc.StatusCode.NOT_FOUND
    assert model[1][ErrorInfo].reason == "MODEL_NOT_FOUND"
    assert unsound[0].code() is grpc.StatusCode.FAILED_PRECONDITION
    assert "expert 3 of layer 1" in unsound[0].details()
    assert unsound[1][ErrorInfo].reason == "INVALID_OUTPUT"
    assert unsound[1][ErrorInfo].metadata["code"] == "invalid_output"
    assert bug[0].code() is grpc.StatusCode.INTERNAL
    assert "secret" not in bug[0].details()
    assert unknown.code() is grpc.StatusCode.UNIMPLEMENTED


def test_messages_and_calls_are_bounded(serve, run):
    worker = FakeAttentionWorker(pause_after=1)

    async def scenario():
        bounds = {"grpc_config": {"max_message_bytes": 4096}, "max_open": 1}
        async with serve(worker, **bounds) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stub = GenerationServiceStub(channel)
            large = await failure(stub.Generate(pb.GenerateRequest(prompt=prompt("x" * 5000))))
            stream = stub.GenerateStream(long_request())
            await stream.read()
            crowd = await failure(stub.Generate(pb.GenerateRequest(prompt=prompt())))
            stream.cancel()
            return large, crowd

    large, crowd = run(scenario)
    assert large.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert "5006" in large.details() or "4096" in large.details()
    assert crowd.code() is grpc.StatusCode.RESOURCE_EXHAUSTED
    assert len(worker.requests) == 1


@pytest.mark.parametrize(
    ("keys", "key", "status", "serves"),
    [
        ({"api_key": "c"}, "c", "OK", "OK"),
        ({"api_key": "c", "operator_key": "o"}, "c", "PERMISSION_DENIED", "OK"),
        ({"api_key": "c", "operator_key": "o"}, "o", "OK", "OK"),
        ({"api_key": "c", "operator_key": "o"}, "x", "UNAUTHENTICATED", "UNAUTHENTICATED"),
        ({"operator_key": "o"}, "x", "UNAUTHENTICATED", "OK"),
    ],
)
def test_state_of_the_cluster_is_for_operators(serve, run, keys, key, status, serves):
    async def code(call):
        try:
            await call
        except grpc.aio.AioRpcError as error:
            return error.code().name
        return "OK"

    async def scenario():
        async with serve(FakeAttentionWorker(), **keys) as (_, address), grpc.aio.insecure_channel(address) as channel:
            metadata = (("authorization", f"Bearer {key}"),)
            cluster = cluster_pb2_grpc.ClusterServiceStub(channel)
            request = pb.GenerateRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=1))
            return (
                await code(cluster.GetStatus(cluster_pb2.GetStatusRequest(), metadata=metadata)),
                await code(cluster.GetExperts(cluster_pb2.GetExpertsRequest(), metadata=metadata)),
                await code(GenerationServiceStub(channel).Generate(request, metadata=metadata)),
            )

    assert run(scenario) == (status, status, serves)


def test_key_is_wanted_everywhere_but_for_health(serve, run):
    def guess(key):
        return (("authorization", key),)

    async def scenario():
        async with serve(FakeAttentionWorker(), api_key="s3cret") as (_, address):
            async with grpc.aio.insecure_channel(address) as channel:
                generate = GenerationServiceStub(channel).Generate
                request = pb.GenerateRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=1))
                missing = await rich_failure(generate(request))
                wrong = [
                    await failure(generate(request, metadata=guess(key)))
                    for key in ("Bearer s3cre", "Bearer s3crets", "s3cret", "basic s3cret", "Bearer")
                ]
                health = await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest())
                listed = await health_pb2_grpc.HealthStub(channel).List(health_pb2.HealthListRequest())
                rights = [
                    await generate(request, metadata=metadata)
                    for metadata in (
                        guess("Bearer s3cret"),
                        guess("bearer  s3cret"),
                        guess("BEARER s3cret"),
                        (("x-api-key", "s3cret"),),
                        (*guess("Bearer EMPTY"), ("x-api-key", "s3cret")),
                    )
                ]
                status = await failure(
                    cluster_pb2_grpc.ClusterServiceStub(channel).GetStatus(cluster_pb2.GetStatusRequest())
                )
            with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError) as raised:
                await asyncio.to_thread(ProtoReflectionDescriptorDatabase(channel).get_services)
            return missing, wrong, health, listed, rights, status, raised.value

    missing, wrong, health, listed, rights, status, reflection = run(scenario)
    assert missing[1][ErrorInfo].reason == "AUTHENTICATION_FAILED"
    for error in (missing[0], *wrong, status, reflection):
        assert error.code() is grpc.StatusCode.UNAUTHENTICATED
    assert health.status == SERVING
    assert set(listed.statuses) == {"", *SERVICES}
    assert [right.usage.completion_tokens for right in rights] == [1] * 5


def test_a_bad_request_id_is_replaced(serve, run):
    async def scenario():
        async with serve(FakeAttentionWorker()) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            ids = []
            for given in ("x" * 500, "two words", ""):
                call = stub.GetStatus(cluster_pb2.GetStatusRequest(), metadata=(("x-request-id", given),))
                await call
                ids.append(dict(await call.trailing_metadata())["x-request-id"])
            return ids

    assert all(len(request_id) == 32 and request_id.isalnum() for request_id in run(scenario))


def test_unknown_fields_are_named_or_refused(serve, run):
    wire = pb.GenerateRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=1)).SerializeToString()
    later = wire + b"\xba\x3e\x01x"  # field 999, a string
    nested = pb.GenerateRequest(sampling=pb.SamplingOptions.FromString(b"\xc0\x3e\x05")).SerializeToString()

    async def ask(address, body):
        async with grpc.aio.insecure_channel(address) as channel:
            method = channel.unary_unary("/moesaic.v1.GenerationService/Generate")
            call = method(body)
            try:
                await call
            except grpc.aio.AioRpcError as error:
                return error.code(), error.details()
            return dict(await call.trailing_metadata()).get("x-moesaic-ignored-fields"), ""

    async def scenario():
        async with serve(FakeAttentionWorker()) as (_, address):
            lenient = [(await ask(address, body))[0] for body in (wire, later, wire + nested)]
        async with serve(FakeAttentionWorker(), strict=True) as (_, address):
            return lenient, [await ask(address, body) for body in (wire, later)]

    lenient, (good, refused) = run(scenario)
    assert lenient == [None, "999", "sampling.1000"]
    assert good == (None, "")
    assert refused[0] is grpc.StatusCode.INVALID_ARGUMENT
    assert "999" in refused[1]
