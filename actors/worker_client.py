"""Reaches the attention workers through a Ray Serve handle: every `.remote` of the front end is here.

Translates Ray's errors into ours, and bounds every call that leaves the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import ray
from ray.exceptions import RayActorError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from actors.token_stream import TokenInbox
from cluster.errors import MoesaicError, Overloaded, Unavailable
from cluster.types import ExpertsReport, GenerationRequest, RequestId, TokenChunk, WorkerStatus

_CALL_TIMEOUT_S = 5.0


class ServeWorkerClient:
    """An `AttentionWorkerClient` over the Serve deployment of attention workers."""

    def __init__(self, handle: DeploymentHandle) -> None:
        self._handle = handle
        self._inbox = TokenInbox(ray.util.get_node_ip_address())

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream one sequence; closing the iterator early stops it in the worker within one step."""
        request_id = request.request_id
        self._inbox.open(request_id)
        ended = False
        try:
            worker_id = await self._call("submit", request, await self._inbox.address())
            await self._inbox.attach(request_id, str(worker_id))
            while not ended:
                chunk = await self._inbox.take(request_id)
                ended = chunk.finish_reason is not None
                yield chunk
        finally:
            self._inbox.close(request_id, abort=not ended)

    async def abort(self, request_id: RequestId) -> None:
        """Stop a sequence within one step."""
        self._inbox.close(request_id, abort=True)

    async def status(self) -> WorkerStatus:
        """Status of the worker; answers in every phase."""
        return await self._call("status")  # type: ignore[return-value]

    async def experts(self) -> ExpertsReport:
        """Residency and activation of experts."""
        return await self._call("experts")  # type: ignore[return-value]

    async def metrics_text(self) -> str:
        """The worker's metrics."""
        return await self._call("metrics_text")  # type: ignore[return-value]

    async def _call(self, method: str, *args: object) -> object:
        try:
            async with asyncio.timeout(_CALL_TIMEOUT_S):
                return await getattr(self._handle, method).remote(*args)
        except TimeoutError as error:
            raise Unavailable(f"the attention worker did not answer {method} within {_CALL_TIMEOUT_S:.0f} s") from error
        except Exception as error:
            raise _translated(error) from error


def _translated(error: Exception) -> Exception:
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, MoesaicError) else MoesaicError(f"the attention worker failed: {cause}")
    if isinstance(error, BackPressureError):
        return Overloaded("the attention workers' queues are full; try again later")
    if isinstance(error, RayActorError | DeploymentUnavailableError):
        return Unavailable("the attention worker was lost; try again")
    return error
