"""How the gRPC server listens: TLS with and without client certificates, files and ports that will not do."""

from __future__ import annotations

import socket
import subprocess

import grpc
import pytest
from fakes import FakeAttentionWorker
from grpc_calls import SERVING, failure, prompt
from grpc_health.v1 import health_pb2, health_pb2_grpc

from cluster.config.sections import FrontendConfig, GrpcConfig
from cluster.errors import ConfigError
from cluster.frontend.grpc_api.server import GrpcServer
from cluster.rpc import generation_pb2 as pb
from cluster.rpc.generation_pb2_grpc import GenerationServiceStub


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
