"""Reaches the attention workers through a Ray Serve handle: every `.remote` of the front end is here.

Translates Ray's errors into ours, and bounds every call that leaves the process.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any

import ray
from ray.exceptions import RayActorError, RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from actors.expert_host_actor import ExpertHostsClient
from actors.token_stream import TokenInbox
from cluster.errors import MoesaicError, Overloaded, Unavailable
from cluster.types import (
    ExpertHostStatus,
    ExpertsReport,
    GenerationRequest,
    RequestId,
    TokenChunk,
    WorkerStatus,
)

_CALL_TIMEOUT_S = 5.0


class ServeWorkerClient:
    """An `AttentionWorkerClient` over the Serve deployment of attention workers."""

    def __init__(self, handle: DeploymentHandle, *, namespace: str, num_hosts: int = 0) -> None:
        self._handle = handle
        self._hosts = ExpertHostsClient(namespace, num_hosts)
        self._inbox = TokenInbox(ray.util.get_node_ip_address())

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        """Stream one sequence; closing the iterator early stops it in the worker within one step."""
        request_id = request.request_id
        self._inbox.open(request_id)
        ended = False
        try:
            worker_id = await self._call("submit", request, await self._inbox.address())
            await self._inbox.attach(request_id, str(worker_id))
            yield TokenChunk(token_ids=())  # taken: the other choices of its answer need not wait for a token
            while not ended:
                chunk = await self._inbox.take(request_id)
                ended = chunk.finish_reason is not None
                yield chunk
        finally:
            self._inbox.close(request_id, abort=not ended)

    async def abort(self, request_id: RequestId) -> None:
        """Stop a sequence within one step."""
        self._inbox.close(request_id, abort=True)

    async def worker_statuses(self) -> tuple[WorkerStatus, ...]:
        """What each worker says of itself; one that does not answer is left out."""
        return await self._ask_all("worker_statuses")

    async def host_statuses(self) -> tuple[ExpertHostStatus, ...]:
        """What each expert host says of itself."""
        return await self._hosts.statuses()

    async def experts_reports(self) -> tuple[ExpertsReport, ...]:
        """Residency and activation of experts, of each worker and then of each host."""
        workers, hosts = await asyncio.gather(self._ask_all("experts_reports"), self._hosts.experts_reports())
        return (*workers, *hosts)

    async def set_expert_cache(self, setting: str) -> tuple[WorkerStatus, ...]:
        """Change every worker's fast expert memory."""
        return await self._ask_all("set_expert_cache", setting)

    async def _ask_all(self, method: str, *args: object) -> tuple[Any, ...]:
        """The answers of all workers, joined.

        Raises:
            Unavailable: none answers in time.
        """
        try:
            answers = await self._handle.broadcast(method, *args).results_async(
                timeout_s=_CALL_TIMEOUT_S, return_exceptions=True
            )
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            raise Unavailable(f"no attention worker answered {method}: {type(error).__name__}") from error
        good = [answer for answer in answers if not isinstance(answer, BaseException)]
        if not good:
            raise _translated(answers[0])
        return tuple(part for answer in good for part in answer)

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
