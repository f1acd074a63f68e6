"""The gRPC face: a `grpc.aio` server with the services of `moesaic.v1`, health and reflection. Knows no Ray.

Health tells two things apart: the empty name is SERVING while the process lives; the names of our services are SERVING
while requests would be answered, and NOT_SERVING from before a drain refuses the first one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import grpc
from grpc_health.v1 import health, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from cluster.config.sections import FrontendConfig, GrpcConfig
from cluster.errors import ConfigError, MoesaicError
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.grpc_api.calls import ApiKeyInterceptor, Calls
from cluster.frontend.grpc_api.health import ListedHealth
from cluster.frontend.grpc_api.servicers import ClusterServicer, GenerationServicer
from cluster.frontend.http.open_requests import OpenRequests
from cluster.frontend.security.api_keys import Keys
from cluster.frontend.security.tls_files import TlsFiles, read_tls_files
from cluster.model.info import ModelInfo
from cluster.network.addresses import join_address
from cluster.observability.metrics import FrontendMetrics
from cluster.periodic import Pace, PeriodicTask
from cluster.protocols import AttentionWorkerClient
from cluster.rpc import cluster_pb2, generation_pb2
from cluster.rpc.cluster_pb2_grpc import add_ClusterServiceServicer_to_server
from cluster.rpc.generation_pb2_grpc import add_GenerationServiceServicer_to_server
from cluster.types import StartupPhase

SERVICES = tuple(
    str(module.DESCRIPTOR.services_by_name[name].full_name)
    for module, name in ((generation_pb2, "GenerationService"), (cluster_pb2, "ClusterService"))
)

_MIN_CLIENT_PING_MS = 10_000
_MAX_AGE_GRACE_S = 30
_POLL_STARTING_S = 0.25
_POLL_READY_S = 2.0
_CLOSE_GRACE_S = 0.2  # only watchers of health are left then, and those never end by themselves


class GrpcServer:
    """One listening server over a `GenerationService`. Make it and call it within one event loop."""

    def __init__(
        self,
        service: GenerationService,
        worker: AttentionWorkerClient,
        info: ModelInfo,
        frontend: FrontendConfig,
        config: GrpcConfig,
        metrics: FrontendMetrics,
        *,
        max_open: int | None = None,
    ) -> None:
        """`max_open` bounds calls of every kind at once; more end with RESOURCE_EXHAUSTED."""
        self._service = service
        self._worker = worker
        self._config = config
        self._host = config.host or frontend.host
        self._requests = OpenRequests(metrics.set_in_flight)
        self._health = ListedHealth()
        self._readiness = PeriodicTask(self._show_readiness, Pace("readiness", interval_s=_POLL_STARTING_S))
        keys = Keys.of(frontend)
        self._server = grpc.aio.server(
            interceptors=[ApiKeyInterceptor(keys)] if keys.are_set else [],
            options=_channel_options(config),
            maximum_concurrent_rpcs=max_open,
        )
        calls = Calls(self._requests, metrics, timeout_s=frontend.request_timeout_s)
        add_GenerationServiceServicer_to_server(
            GenerationServicer(service, info, calls, refuses_unknown=frontend.strict), self._server
        )
        add_ClusterServiceServicer_to_server(
            ClusterServicer(worker, self._requests, calls, max_age_s=frontend.status_max_age_s), self._server
        )
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        if config.reflection:
            names = (*SERVICES, health.SERVICE_NAME, reflection.SERVICE_NAME)
            reflection.enable_server_reflection(names, self._server)

    @property
    def num_in_flight(self) -> int:
        """Generation requests being answered."""
        return self._requests.num_in_flight

    async def start(self) -> None:
        """Listen, and answer; readiness is followed from now on.

        Raises:
            ConfigError: the address cannot be listened on, or a TLS file cannot be used; names the field.
        """
        await self._health.show("", serving=True)
        await self._set_ready(ready=False)
        self._listen()
        await self._server.start()
        self._readiness.start()

    def abort_answers(self, names: Sequence[str]) -> frozenset[str]:
        """End the answers of those names; the names that had a running sequence."""
        return self._service.abort_answers(names)

    async def begin_drain(self) -> None:
        """Show NOT_SERVING first, then refuse new generation requests; there is no way back."""
        await self._readiness.close()
        await self._set_ready(ready=False)
        self._requests.begin_drain()

    async def stop(self, timeout_s: float) -> None:
        """Drain for at most `timeout_s`, then cancel what is left and close."""
        await self.begin_drain()
        await self._requests.wait_idle(timeout_s)
        await self._server.stop(_CLOSE_GRACE_S)

    def _listen(self) -> None:
        config = self._config
        tls = read_tls_files(config)
        address = join_address(self._host, config.port)
        try:
            if tls is None:
                self._server.add_insecure_port(address)
            else:
                self._server.add_secure_port(address, _credentials(tls))
        except RuntimeError as error:
            way_out = "stop the program that listens there, or choose another grpc.port (--grpc-port)"
            raise ConfigError(f"gRPC cannot listen on {address}; {way_out}") from error

    async def _show_readiness(self) -> float:
        """Show what the workers say; a worker that does not answer is not ready. Seconds until they are asked again."""
        is_ready = False
        try:
            statuses = await self._worker.worker_statuses()
            is_ready = any(each.phase is StartupPhase.READY and not each.is_failing for each in statuses)
        except (MoesaicError, ConnectionError, TimeoutError):
            pass
        finally:
            await self._set_ready(ready=is_ready)
        return _POLL_READY_S if is_ready else _POLL_STARTING_S

    async def _set_ready(self, *, ready: bool) -> None:
        for name in SERVICES:
            await self._health.show(name, serving=ready)


def _channel_options(config: GrpcConfig) -> Sequence[tuple[str, Any]]:
    """Arguments of gRPC core, which ignores a misspelt name silently."""
    options: list[tuple[str, Any]] = [
        ("grpc.so_reuseport", 0),  # else a second server on the same port takes half of the calls
        ("grpc.max_receive_message_length", config.max_message_bytes),
        ("grpc.max_send_message_length", config.max_message_bytes),
        ("grpc.max_concurrent_streams", config.max_concurrent_streams),
        ("grpc.keepalive_time_ms", int(config.keepalive_s * 1000)),
        ("grpc.keepalive_timeout_ms", int(config.keepalive_timeout_s * 1000)),
        ("grpc.keepalive_permit_without_calls", 1),
        # Clients that ping more often than every 5 minutes must not lose their calls to "too_many_pings".
        ("grpc.http2.max_ping_strikes", 0),
        ("grpc.http2.min_ping_interval_without_data_ms", _MIN_CLIENT_PING_MS),
    ]
    if config.max_connection_age_s is not None:
        options.append(("grpc.max_connection_age_ms", int(config.max_connection_age_s * 1000)))
        options.append(("grpc.max_connection_age_grace_ms", _MAX_AGE_GRACE_S * 1000))
    return options


def _credentials(tls: TlsFiles) -> grpc.ServerCredentials:
    pair = [(tls.key, tls.chain)]
    if tls.client_ca is None:
        return grpc.ssl_server_credentials(pair)
    return grpc.ssl_server_credentials(pair, root_certificates=tls.client_ca, require_client_auth=True)
