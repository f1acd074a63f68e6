"""Step 1 of a gRPC request's walk under Ray: the actor that owns one `GrpcServer`. No logic but its life.

Light to import: gRPC comes in only where the server is made. Ray's options are in `gateway_actors.py`.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from typing import TYPE_CHECKING

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.control.presence import Presence
from cluster.deployed_spec import DeployedSpec
from cluster.errors import MoesaicError, Unavailable
from cluster.frontend.generation.late_workers import LateWorkers
from cluster.logs import configure_logging, log_event
from cluster.model.info import ModelInfo
from cluster.network.addresses import join_address
from cluster.observability.metrics import FrontendMetrics

if TYPE_CHECKING:
    from cluster.frontend.generation.prompt_embedder import PromptEmbedder
    from cluster.frontend.generation.tokenizer import Tokenizer
    from cluster.frontend.grpc_api.server import GrpcServer
    from cluster.protocols import AttentionWorkerClient

_FIND_EVERY_S = 0.5
_RETRY_S = 2.0
_LOOK_EVERY_S = 5.0
_STOP_TIMEOUT_S = 0.5


class GrpcGateway:
    """Async Ray actor around one GrpcServer: starts it beside everything else, and ends with the application."""

    def __init__(self, spec: DeployedSpec) -> None:
        configure_logging()
        self._spec, self._config = spec, spec.config
        self._server: GrpcServer | None = None
        self._error: MoesaicError | None = None
        self._embedder: PromptEmbedder | None = None
        self._settled = asyncio.Event()  # it listens, or why it does not is known
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._start()), loop.create_task(self._follow_application())]

    async def port(self) -> int:
        """Where it listens, or means to."""
        return self._config.grpc.port

    async def address(self) -> str:
        """Where it listens; waits until it does.

        Raises:
            ConfigError: it cannot, and why.
        """
        await self._settled.wait()
        if self._error is not None:
            raise self._error
        from actors.ray_shells.gateway_actors import reachable_host

        config = self._config
        return join_address(reachable_host(config.grpc.host or config.frontend.host), config.grpc.port)

    async def abort_answers(self, names: tuple[str, ...]) -> frozenset[str]:
        """End the answers of those names that are given here; the names that had a running sequence."""
        return frozenset() if self._server is None else self._server.abort_answers(names)

    async def begin_drain(self) -> None:
        """Show NOT_SERVING, then refuse new requests from now on."""
        if self._server is not None:
            await self._server.begin_drain()

    async def num_in_flight(self) -> int:
        """Requests still being answered."""
        return 0 if self._server is None else self._server.num_in_flight

    async def stop(self) -> None:
        """Close the server; what is in flight is cancelled."""
        for task in self._tasks:
            task.cancel()
        if self._server is not None:
            await self._server.stop(_STOP_TIMEOUT_S)

    async def _start(self) -> None:
        """Listen, refusing until there are workers to ask; try again where it fails."""
        while self._server is None:
            try:
                loaded = await asyncio.to_thread(self._load)
                workers = LateWorkers()
                server = self._make_server(workers, *loaded)
                try:
                    await server.start()
                except MoesaicError:
                    await server.stop(0)
                    raise
                self._server, self._error = server, None
                self._settled.set()
                workers.found(await self._find_workers())
            except Exception as error:  # noqa: BLE001 - a top loop: shown to whoever asks for the address
                ours = isinstance(error, MoesaicError)
                self._error = error if ours else MoesaicError(f"the gRPC gateway could not start: {error!r}")
                log_event(_logger(), logging.ERROR, "gRPC could not start", error=error)
            self._settled.set()
            if self._error is not None:
                await asyncio.sleep(_RETRY_S)

    def _load(self) -> tuple[ModelInfo, Tokenizer, PromptEmbedder]:
        """Everything that takes time and needs no workers."""
        import cluster.frontend.grpc_api.server  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from cluster.frontend.generation.prompt_embedder import PromptEmbedder
        from cluster.frontend.generation.tokenizer import Tokenizer

        info = self._spec.read_model()
        if self._embedder is None:
            self._embedder = PromptEmbedder(info.path, info.vocab_size)
        return info, Tokenizer.load(info.path), self._embedder

    async def _find_workers(self) -> AttentionWorkerClient:
        from actors.ray_shells.gateway_actors import workers_of
        from actors.ray_shells.scheduler_client import SchedulerLink
        from actors.ray_shells.worker_client import ServeWorkerClient

        config, link = self._config, SchedulerLink(self._spec.application)
        while True:
            with contextlib.suppress(Unavailable):
                served_as = await link.owner()
                if served_as is not None:
                    handle = await asyncio.to_thread(workers_of, served_as)
                    return ServeWorkerClient(handle, application=self._spec.application, num_hosts=config.experts.hosts)
            await asyncio.sleep(_FIND_EVERY_S)

    def _make_server(
        self, workers: AttentionWorkerClient, info: ModelInfo, tokenizer: Tokenizer, embedder: PromptEmbedder
    ) -> GrpcServer:
        from cluster.frontend.generation.service import GenerationService
        from cluster.frontend.grpc_api.server import GrpcServer

        config, metrics = self._config, FrontendMetrics()
        service = GenerationService(workers, tokenizer, info, config.frontend, metrics, embedder.embed)
        attention = config.attention
        max_open = 2 * attention.workers * (attention.max_running + attention.max_queue) + 64
        return GrpcServer(service, workers, info, config.frontend, config.grpc, metrics, max_open=max_open)

    async def _follow_application(self) -> None:
        """See that every node that needs a gateway has one. End when there is no scheduler, which ends all that is left
        of an application that is gone; begin anew when Serve is another one, in which handles of the last say nothing.
        """
        from actors.ray_shells.gateway_actors import Gateways, end_this_actor, restart_this_actor
        from actors.ray_shells.named_actors import has_scheduler
        from actors.ray_shells.serve_state import controller_id

        gateways, application = Gateways(self._spec.application), self._spec.application
        presence, serve_id = Presence(time.monotonic()), ""
        while True:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                there = await asyncio.to_thread(has_scheduler, application)
                if presence.note(there, time.monotonic()):
                    break
                now_id = await asyncio.to_thread(controller_id)
                serve_id = serve_id or now_id
                if now_id and now_id != serve_id:
                    log_event(_logger(), logging.INFO, "Serve was started anew; so is the gRPC gateway")
                    restart_this_actor()
                if there and now_id:
                    await asyncio.to_thread(gateways.start_missing, type(self), self._spec)
            except (RayError, RayServeException) as error:  # nothing is known
                presence.note(None, time.monotonic())
                log_event(_logger(), logging.WARNING, "Ray does not answer", reason=repr(error))
        log_event(_logger(), logging.INFO, "the application is gone; the gRPC gateway ends")
        end_this_actor()


def _logger() -> logging.Logger:
    return logging.getLogger(__name__)
