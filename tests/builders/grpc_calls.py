"""A gRPC server over a scripted worker, and calls to it: what they ask, and what they fail with."""

from __future__ import annotations

import asyncio
from contextlib import asynccontextmanager

import grpc
import pytest
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from grpc_health.v1 import health_pb2
from grpc_status import rpc_status
from live_server import free_port

from cluster.config.sections import FrontendConfig, GrpcConfig
from cluster.frontend.grpc_api.server import GrpcServer
from cluster.rpc import generation_pb2 as pb

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
