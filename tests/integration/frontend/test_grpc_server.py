"""The gRPC server over a scripted worker, with the generated stubs and with a client that knows nothing beforehand."""

from __future__ import annotations

import asyncio
import socket
import subprocess
from contextlib import asynccontextmanager

import grpc
import pytest
from fakes import FakeAttentionWorker
from google.protobuf.descriptor_pool import DescriptorPool
from google.protobuf.message_factory import GetMessageClass
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha.proto_reflection_descriptor_database import ProtoReflectionDescriptorDatabase
from grpc_status import rpc_status
from live_server import free_port

from cluster.config.sections import FrontendConfig, GrpcConfig
from cluster.errors import ConfigError, InvalidOutput, Overloaded
from cluster.frontend.grpc_api.server import SERVICES, GrpcServer
from cluster.rpc import cluster_pb2, cluster_pb2_grpc
from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub
from cluster.types import StartupPhase

DEADLINE_S = 20
SERVING = health_pb2.HealthCheckResponse.SERVING
NOT_SERVING = health_pb2.HealthCheckResponse.NOT_SERVING


@pytest.fixture
def serve(make_service, info, metrics):
    """Starts a server over a worker; gives it and its address."""

    @asynccontextmanager
    async def running(worker, *, grpc_config=None, max_open=None, **frontend):
        config = GrpcConfig(port=free_port(), **(grpc_config or {}))
        service = make_service(worker, **frontend)
        frontend_config = FrontendConfig(**{"status_max_age_s": 0.0, **frontend})
        server = GrpcServer(service, worker, info, frontend_config, config, metrics, max_open=max_open)
        await server.start()
        try:
            yield server, f"127.0.0.1:{config.port}"
        finally:
            await server.stop(0)

    return running


@pytest.fixture
def run():
    """Runs a scenario, which must end."""

    def go(scenario):
        async def bounded():
            async with asyncio.timeout(DEADLINE_S):
                return await scenario()

        return asyncio.run(bounded())

    return go


def prompt(text="hi"):
    return pb.Prompt(text=text)


def long_request():
    return pb.GenerateStreamRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=1500))


async def failure(call):
    """What a call fails with: code and details, by type."""
    with pytest.raises(grpc.aio.AioRpcError) as raised:
        await call
    return raised.value


async def rich_failure(call):
    error = await failure(call)
    found = {}
    for detail in (await rpc_status.aio.from_call(FinishedCall(error))).details:
        for kind in (ErrorInfo, BadRequest, RetryInfo):
            message = kind()
            if detail.Unpack(message):
                found[kind] = message
    return error, found


class FinishedCall:
    """What `rpc_status` wants to see of a call that failed."""

    def __init__(self, error):
        self._error = error

    async def code(self):
        return self._error.code()

    async def details(self):
        return self._error.details()

    async def trailing_metadata(self):
        return self._error.trailing_metadata()


async def until(condition):
    while not condition():
        await asyncio.sleep(0.005)


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
    assert (memory.hits, memory.misses_by_tier.host) == (7, 3)
    assert [tier.tier for tier in memory.tiers] == [
        cluster_pb2.TIER_DEVICE,
        cluster_pb2.TIER_HOST,
        cluster_pb2.TIER_DISK,
    ]
    assert experts.reports[0].owner_id == "w0"
    assert list(experts.reports[0].layers[0].resident) == [1]
    assert list(experts.reports[0].layers[0].host_resident) == [0, 1]
    assert list(experts.reports[0].layers[0].activations.prefill) == [2, 3]
    assert list(experts.cluster.layers[0].activations.prefill) == [2, 6]
    assert away.code() is grpc.StatusCode.UNAVAILABLE
    assert RetryInfo in details


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A certificate authority, and a certificate of it for 127.0.0.1, for servers and clients alike."""
    folder = tmp_path_factory.mktemp("tls")

    def openssl(*arguments):
        subprocess.run(["openssl", *arguments], cwd=folder, check=True, capture_output=True)

    new_key = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    openssl("req", "-x509", *new_key, "-keyout", "ca.key", "-out", "ca.pem", "-subj", "/CN=test ca", "-days", "2")
    openssl("req", *new_key, "-keyout", "tls.key", "-out", "tls.csr", "-subj", "/CN=moesaic")
    (folder / "san").write_text("subjectAltName=IP:127.0.0.1")
    signing = ["-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial", "-days", "2", "-extfile", "san"]
    openssl("x509", "-req", "-in", "tls.csr", "-out", "tls.pem", *signing)
    return folder


def test_tls_with_client_certificates(serve, run, certificates):
    ca, key, chain = ((certificates / name).read_bytes() for name in ("ca.pem", "tls.key", "tls.pem"))
    files = {
        "tls_cert": str(certificates / "tls.pem"),
        "tls_key": str(certificates / "tls.key"),
        "tls_client_ca": str(certificates / "ca.pem"),
    }

    async def check(channel):
        async with channel:
            return await health_pb2_grpc.HealthStub(channel).Check(health_pb2.HealthCheckRequest(), timeout=5)

    async def scenario():
        async with serve(FakeAttentionWorker(), grpc_config=files) as (_, address):
            with_both = grpc.ssl_channel_credentials(ca, key, chain)
            answer = await check(grpc.aio.secure_channel(address, with_both))
            anonymous = await failure(check(grpc.aio.secure_channel(address, grpc.ssl_channel_credentials(ca))))
            plain = await failure(check(grpc.aio.insecure_channel(address)))
            return answer, anonymous, plain

    answer, anonymous, plain = run(scenario)
    assert answer.status == SERVING
    assert anonymous.code() is grpc.StatusCode.UNAVAILABLE
    assert plain.code() is grpc.StatusCode.UNAVAILABLE


def test_tls_without_client_certificates(serve, run, certificates):
    files = {"tls_cert": str(certificates / "tls.pem"), "tls_key": str(certificates / "tls.key")}

    async def scenario():
        credentials = grpc.ssl_channel_credentials((certificates / "ca.pem").read_bytes())
        async with (
            serve(FakeAttentionWorker(), grpc_config=files) as (_, address),
            grpc.aio.secure_channel(address, credentials) as channel,
        ):
            return await GenerationServiceStub(channel).Generate(
                pb.GenerateRequest(prompt=prompt(), sampling=pb.SamplingOptions(max_tokens=2))
            )

    assert run(scenario).usage.completion_tokens == 2


@pytest.mark.parametrize(
    ("cert", "key", "words"),
    [
        ("/nosuch.pem", "tls.key", ["grpc.tls_cert", "/nosuch.pem"]),
        ("san", "tls.key", ["grpc.tls_cert", "san", "PEM"]),
        ("tls.pem", "ca.key", ["grpc.tls_key", "ca.key", "MISMATCH"]),
    ],
)
def test_bad_tls_files_are_named(serve, run, certificates, cert, key, words):
    files = {"tls_cert": str(certificates / cert), "tls_key": str(certificates / key)}

    async def scenario():
        async with serve(FakeAttentionWorker(), grpc_config=files):
            pass

    with pytest.raises(ConfigError) as raised:
        run(scenario)
    assert all(word in raised.value.message for word in words)


def test_a_port_in_use_is_named(make_service, info, metrics, run):
    worker = FakeAttentionWorker()

    async def scenario():
        with socket.create_server(("127.0.0.1", 0)) as taken:
            port = taken.getsockname()[1]
            config = GrpcConfig(port=port)
            server = GrpcServer(make_service(worker), worker, info, FrontendConfig(), config, metrics)
            with pytest.raises(ConfigError) as raised:
                await server.start()
            await server.stop(0)
            return port, raised.value.message

    port, message = run(scenario)
    assert f"127.0.0.1:{port}" in message
    assert "--grpc-port" in message
