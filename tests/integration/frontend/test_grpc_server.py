"""The gRPC server over a scripted worker, with the generated stubs and with a client that knows nothing beforehand."""

from __future__ import annotations

import asyncio

import grpc
import pytest
from fakes import FakeAttentionWorker
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import ErrorInfo, RetryInfo
from grpc_calls import DEADLINE_S, NOT_SERVING, SERVING, failure, long_request, prompt, rich_failure, until
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase

from cluster.frontend.grpc_api.server import SERVICES
from cluster.rpc import cluster_pb2, cluster_pb2_grpc
from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub
from cluster.types import StartupPhase


def test_stub_gets_the_whole_answer(serve, run, tokenizer):
    script = tokenizer.encode(" naïve words")
    worker = FakeAttentionWorker(script, num_cached_tokens=1)

    async def scenario():
        async with serve(worker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            call = GenerationServiceStub(channel).Generate(
                pb.GenerateRequest(
                    model="moesaic-demo",
                    prompt=prompt(),
                    sampling=pb.SamplingOptions(max_tokens=len(script), num_logprobs=2, n=2, seed=5),
                ),
                metadata=(("x-request-id", "mine"),),
            )
            return await call, dict(await call.trailing_metadata())

    response, trailers = run(scenario)
    assert [choice.text for choice in response.choices] == [" naïve words"] * 2
    assert [choice.index for choice in response.choices] == [0, 1]
    assert list(response.choices[1].token_ids) == script
    assert response.choices[0].finish_reason == pb.FINISH_REASON_LENGTH
    entries = response.choices[0].logprobs
    assert b"".join(entry.chosen.raw for entry in entries).decode() == " naïve words"
    assert [entry.chosen.token_id for entry in entries] == script
    assert {len(entry.top) for entry in entries} == {2}
    num_prompt = len(worker.requests[0].prompt_ids)
    assert response.usage == pb.Usage(prompt_tokens=num_prompt, completion_tokens=2 * len(script), cached_tokens=1)
    assert {request.sampling.seed for request in worker.requests} == {5}
    assert trailers["x-request-id"] == "mine"
    assert worker.aborted == []


def test_stub_streams_a_chat(serve, run, tokenizer):
    script = tokenizer.encode(" one two three")
    worker = FakeAttentionWorker([*script, 2], end_token=2)
    messages = [pb.ChatMessage(role="user", content="hi")]

    async def scenario():
        async with serve(worker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            request = pb.GenerateStreamRequest(prompt=pb.Prompt(chat=pb.Chat(messages=messages)))
            return [piece async for piece in GenerationServiceStub(channel).GenerateStream(request)]

    pieces = run(scenario)
    assert "".join(piece.text for piece in pieces) == " one two three"
    assert [token_id for piece in pieces for token_id in piece.token_ids] == [*script, 2]
    assert {piece.finish_reason for piece in pieces[:-1]} == {pb.FINISH_REASON_UNSPECIFIED}
    assert not any(piece.HasField("usage") for piece in pieces[:-1])
    assert pieces[-1].finish_reason == pb.FINISH_REASON_STOP
    assert pieces[-1].usage.completion_tokens == len(script) + 1
    assert worker.requests[0].sampling.max_tokens == 2048 - len(worker.requests[0].prompt_ids)


def test_a_client_that_knows_nothing_learns_all_by_reflection(serve, run, tokenizer):
    script = tokenizer.encode(" ok")
    worker = FakeAttentionWorker(script)

    def talk(address):
        with grpc.insecure_channel(address) as channel:
            database = ProtoReflectionDescriptorDatabase(channel)
            pool = DescriptorPool(database)
            service = pool.FindServiceByName("moesaic.v1.GenerationService")
            unary, stream = (service.methods_by_name[name] for name in ("Generate", "GenerateStream"))
            answers = []
            for method, factory in ((unary, channel.unary_unary), (stream, channel.unary_stream)):
                request = GetMessageClass(method.input_type)()
                request.prompt.token_ids.ids.extend([5, 6])
                request.sampling.max_tokens = len(script)
                answer = factory(
                    f"/{service.full_name}/{method.name}",
                    request_serializer=lambda message: message.SerializeToString(),
                    response_deserializer=GetMessageClass(method.output_type).FromString,
                )(request, timeout=DEADLINE_S)
                answers.append(answer if method is unary else list(answer))
            return set(database.get_services()), answers[0].choices[0].text, [piece.text for piece in answers[1]]

    async def scenario():
        async with serve(worker) as (_, address):
            return await asyncio.to_thread(talk, address)

    services, whole, pieces = run(scenario)
    assert services == {*SERVICES, "grpc.health.v1.Health", "grpc.reflection.v1alpha.ServerReflection"}
    assert whole == " ok"
    assert "".join(pieces) == " ok"
    assert worker.requests[0].prompt_ids == (5, 6)


def test_reflection_can_be_off(serve, run):
    async def scenario():
        async with serve(FakeAttentionWorker(), grpc_config={"reflection": False}) as (_, address):
            with grpc.insecure_channel(address) as channel:
                database = ProtoReflectionDescriptorDatabase(channel)
                with pytest.raises(grpc.RpcError) as raised:
                    await asyncio.to_thread(database.get_services)
            return raised.value.code()

    assert run(scenario) is grpc.StatusCode.UNIMPLEMENTED


def test_the_clients_deadline_ends_the_sequence(serve, run):
    worker = FakeAttentionWorker(pause_after=3)

    async def scenario():
        async with serve(worker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stub = GenerationServiceStub(channel)
            request = pb.GenerateRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=1500))
            error = await failure(stub.Generate(request, timeout=0.05))
            await until(lambda: worker.aborted)
            return error.code()

    assert run(scenario) is grpc.StatusCode.DEADLINE_EXCEEDED
    assert worker.aborted == [worker.requests[0].request_id]
    assert worker.closed == worker.aborted


def test_the_servers_own_deadline_says_so(serve, run):
    worker = FakeAttentionWorker(pause_after=3)

    async def scenario():
        async with serve(worker, request_timeout_s=0.05) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stream = GenerationServiceStub(channel).GenerateStream(long_request())
            pieces = []

            async def read():
                async for piece in stream:
                    pieces.append(piece)

            return await rich_failure(read()), pieces

    (error, details), pieces = run(scenario)
    assert error.code() is grpc.StatusCode.DEADLINE_EXCEEDED
    assert details[ErrorInfo].reason == "DEADLINE_EXCEEDED"
    assert len(pieces) == 3
    assert worker.aborted == [worker.requests[0].request_id]


def test_cancelling_a_stream_stops_the_sequence(serve, run):
    worker = FakeAttentionWorker(pause_after=5)

    async def scenario():
        async with serve(worker) as (server, address), grpc.aio.insecure_channel(address) as channel:
            stream = GenerationServiceStub(channel).GenerateStream(long_request())
            await stream.read()
            await worker.paused.wait()
            assert server.num_in_flight == 1
            stream.cancel()
            await until(lambda: worker.closed)
            await until(lambda: server.num_in_flight == 0)

    run(scenario)
    assert worker.aborted == worker.closed == [worker.requests[0].request_id]
    assert worker.num_emitted == 5


def test_a_client_that_vanishes_stops_the_sequence(serve, run):
    worker = FakeAttentionWorker(pause_after=5)

    async def scenario():
        async with serve(worker) as (_, address):
            async with grpc.aio.insecure_channel(address) as channel:
                await GenerationServiceStub(channel).GenerateStream(long_request()).read()
                await worker.paused.wait()
            await until(lambda: worker.closed)

    run(scenario)
    assert worker.aborted == [worker.requests[0].request_id]


@pytest.mark.parametrize("by", ["client", "server", "answer"])
def test_an_answer_can_be_aborted_by_its_names(serve, run, by):
    worker = FakeAttentionWorker(pause_after=2)

    async def scenario():
        async with serve(worker) as (server, address), grpc.aio.insecure_channel(address) as channel:
            metadata = (("x-request-id", "mine"),) if by == "client" else ()
            request = pb.GenerateStreamRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=50, n=2))
            stream = GenerationServiceStub(channel).GenerateStream(request, metadata=metadata)
            answers = aiter(stream)
            pieces = [await anext(answers)]
            name = dict(await stream.initial_metadata())["x-request-id"]
            if by == "answer":
                name = str(worker.requests[0].request_id).rpartition("-")[0]
            assert server.abort_answers(["nobody"]) == frozenset()
            assert server.abort_answers(["nobody", name]) == {name}
            pieces += [piece async for piece in answers]
            assert server.abort_answers([name]) == frozenset(), "it is over"
            return name, pieces, dict(await stream.trailing_metadata())

    name, pieces, trailers = run(scenario)
    if by != "answer":
        assert trailers["x-request-id"] == name
    reasons = [piece.finish_reason for piece in pieces if piece.finish_reason]
    assert reasons == [pb.FINISH_REASON_ABORT] * 2
    assert set(worker.aborted) == {request.request_id for request in worker.requests}


def test_health_follows_the_worker_and_turns_before_a_drain(serve, run):
    worker = FakeAttentionWorker(pause_after=2)
    worker.phase = StartupPhase.LOADING

    async def scenario():
        async with serve(worker) as (server, address), grpc.aio.insecure_channel(address) as channel:
            health = health_pb2_grpc.HealthStub(channel)
            watch = health.Watch(health_pb2.HealthCheckRequest(service="moesaic.v1.GenerationService"))
            seen = [(await watch.read()).status]
            worker.phase = StartupPhase.READY
            seen.append((await watch.read()).status)
            stub = GenerationServiceStub(channel)
            stream = aiter(stub.GenerateStream(long_request()))
            await anext(stream)

            stop = asyncio.create_task(server.stop(DEADLINE_S))
            seen.append((await watch.read()).status)
            alive = (await health.Check(health_pb2.HealthCheckRequest())).status
            refused = await rich_failure(stub.Generate(pb.GenerateRequest(prompt=prompt())))
            status = await cluster_pb2_grpc.ClusterServiceStub(channel).GetStatus(cluster_pb2.GetStatusRequest())
            assert not stop.done()
            worker.resume.set()
            rest = [piece async for piece in stream]
            await stop
            return seen, alive, refused, status, rest

    seen, alive, (refused, details), status, rest = run(scenario)
    assert seen == [NOT_SERVING, SERVING, NOT_SERVING]
    assert alive == SERVING, "the process still lives"
    assert refused.code() is grpc.StatusCode.UNAVAILABLE
    assert details[RetryInfo].retry_delay.ToMilliseconds() > 0
    assert (status.draining, status.num_in_flight) == (True, 1)
    assert rest[-1].usage.completion_tokens == 1500, "what ran was finished"
    assert len(worker.requests) == 1


def test_cluster_service_shows_workers_and_experts(serve, run):
    worker = FakeAttentionWorker()

    async def scenario():
        async with serve(worker) as (_, address), grpc.aio.insecure_channel(address) as channel:
            stub = cluster_pb2_grpc.ClusterServiceStub(channel)
            status = await stub.GetStatus(cluster_pb2.GetStatusRequest())
            experts = await stub.GetExperts(cluster_pb2.GetExpertsRequest())
            worker.status_error = ConnectionError("gone")
            return status, experts, await rich_failure(stub.GetStatus(cluster_pb2.GetStatusRequest()))

    status, experts, (away, details) = run(scenario)
    assert status.workers[0].worker_id == "w0"
    assert status.workers[0].phase == cluster_pb2.STARTUP_PHASE_READY
    memory = status.workers[0].expert_memory
    assert (memory.hits, memory.misses_by_tier.ram) == (7, 3)
    assert [tier.tier for tier in memory.tiers] == [
        cluster_pb2.TIER_DEVICE,
        cluster_pb2.TIER_RAM,
        cluster_pb2.TIER_DISK,
    ]
    assert experts.reports[0].owner_id == "w0"
    assert list(experts.reports[0].layers[0].resident) == [1]
    assert list(experts.reports[0].layers[0].ram_resident) == [0, 1]
    assert list(experts.reports[0].layers[0].activations.prefill) == [2, 3]
    assert list(experts.cluster.layers[0].activations.prefill) == [2, 6]
    assert away.code() is grpc.StatusCode.UNAVAILABLE
    assert RetryInfo in details
