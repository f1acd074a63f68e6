"""Step 1 of a gRPC request's walk under Ray: the actor that owns one `GrpcServer`. No logic but its life.

Light to import: gRPC comes in only where the server is made. Ray's options are in `actors/gateway.py`.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Any

from ray.exceptions import RayError
from ray.serve.exceptions import RayServeException

from cluster.config import from_tree
from cluster.errors import MoesaicError
from cluster.frontend.late_workers import LateWorkers
from cluster.model_info import ModelInfo, read_model_info
from cluster.observability.logs import configure_logging, log_event
from cluster.observability.metrics import FrontendMetrics

if TYPE_CHECKING:
    from cluster.frontend.grpc_server import GrpcServer
    from cluster.frontend.prompt_embedder import PromptEmbedder
    from cluster.frontend.tokenizer import Tokenizer
    from cluster.protocols import AttentionWorkerClient

_FIND_EVERY_S = 0.5
_RETRY_S = 2.0
_LOOK_EVERY_S = 5.0
_ORPHAN_S = 30.0  # also the time that an application may take to appear after its gateway
_STOP_TIMEOUT_S = 0.5


class GrpcGateway:
    """Async Ray actor around one GrpcServer: starts it beside everything else, and ends with the application."""

    def __init__(self, config_tree: dict[str, Any]) -> None:
        configure_logging()
        self._tree = config_tree
        self._config = from_tree(config_tree)
        self._server: GrpcServer | None = None
        self._error: MoesaicError | None = None
        self._embedder: PromptEmbedder | None = None
        self._settled = asyncio.Event()  # it listens, or why it does not is known
        loop = asyncio.get_running_loop()
        self._tasks = [loop.create_task(self._start()), loop.create_task(self._follow_application())]

    async def is_configured_by(self, config_tree: dict[str, Any]) -> bool:
        """Whether this gateway was made with this configuration."""
        return self._tree == config_tree

    async def address(self) -> str:
        """Where it listens; waits until it does.

        Raises:
            ConfigError: it cannot, and why.
        """
        await self._settled.wait()
        if self._error is not None:
            raise self._error
        from actors.gateway import reachable_host

        config = self._config
        return f"{reachable_host(config.grpc.host or config.frontend.host)}:{config.grpc.port}"

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
        import cluster.frontend.grpc_server  # noqa: F401  # pyright: ignore[reportUnusedImport]
        from cluster.frontend.prompt_embedder import PromptEmbedder
        from cluster.frontend.tokenizer import Tokenizer

        info = read_model_info(self._config.model)
        if self._embedder is None:
            self._embedder = PromptEmbedder(info.path, info.vocab_size)
        return info, Tokenizer.load(info.path), self._embedder

    async def _find_workers(self) -> AttentionWorkerClient:
        from actors.gateway import find_workers
        from actors.worker_client import ServeWorkerClient

        config = self._config
        while True:
            handle = await asyncio.to_thread(find_workers)
            if handle is not None:
                return ServeWorkerClient(handle, namespace=config.ray.namespace, num_hosts=config.experts.hosts)
            await asyncio.sleep(_FIND_EVERY_S)

    def _make_server(
        self, workers: AttentionWorkerClient, info: ModelInfo, tokenizer: Tokenizer, embedder: PromptEmbedder
    ) -> GrpcServer:
        from cluster.frontend.generation import GenerationService
        from cluster.frontend.grpc_server import GrpcServer

        config, metrics = self._config, FrontendMetrics()
        service = GenerationService(workers, tokenizer, info, config.frontend, metrics, embedder.embed)
        attention = config.attention
        max_open = 2 * attention.workers * (attention.max_running + attention.max_queue) + 64
        return GrpcServer(service, workers, info, config.frontend, config.grpc, metrics, max_open=max_open)

    async def _follow_application(self) -> None:
        """End when the application is gone; while it is there, see that every node that needs a gateway has one."""
        from actors.gateway import Gateways, end_this_actor, find_workers

        gateways = Gateways(self._config.ray.namespace)
        missed_s: float | None = None  # since when Serve has said that there is no application
        while missed_s is None or time.monotonic() - missed_s < _ORPHAN_S:
            await asyncio.sleep(_LOOK_EVERY_S)
            try:
                if await asyncio.to_thread(find_workers) is None:
                    missed_s = missed_s or time.monotonic()
                    continue
                missed_s = None
                await asyncio.to_thread(gateways.start_missing, type(self), self._tree)
            except (RayError, RayServeException) as error:  # Serve's controller is away: nothing is known
                missed_s = None
                log_event(_logger(), logging.WARNING, "Serve does not answer", reason=repr(error))
        log_event(_logger(), logging.INFO, "the application is gone; the gRPC gateway ends")
        end_this_actor()


def _logger() -> logging.Logger:
    return logging.getLogger(__name__)
