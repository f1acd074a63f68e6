"""Stands in for attention workers until they are found: a server can listen before there are any, and say so."""

from __future__ import annotations

from collections.abc import AsyncIterator

from cluster.errors import Unavailable
from cluster.protocols import AttentionWorkerClient
from cluster.status.experts import ExpertsReport
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus
from cluster.types import GenerationRequest, RequestId, TokenChunk


class LateWorkers:
    """An `AttentionWorkerClient` that refuses, retryably, until it is given another one."""

    def __init__(self) -> None:
        self._found: AttentionWorkerClient | None = None

    def found(self, workers: AttentionWorkerClient) -> None:
        """From now on these are asked."""
        self._found = workers

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """As the workers'."""
        chunks = self._workers.generate(request)
        try:
            async for chunk in chunks:
                yield chunk
        finally:
            await chunks.aclose()  # type: ignore[attr-defined]

    async def abort(self, request_id: RequestId) -> None:
        """As the workers'."""
        await self._workers.abort(request_id)

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        """As the workers'."""
        return await self._workers.worker_statuses()

    async def host_statuses(self) -> tuple[ExpertHostStatus, ...]:
        """As the workers'."""
        return await self._workers.host_statuses()

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        """As the workers'."""
        return await self._workers.experts_reports()

    async def set_expert_cache(self, setting: str) -> tuple[WorkerStatus, ...]:
        """As the workers'."""
        return await self._workers.set_expert_cache(setting)

    @property
    def _workers(self) -> AttentionWorkerClient:
        if self._found is None:
            raise Unavailable("the server is starting and has no attention workers yet; try again later")
        return self._found
