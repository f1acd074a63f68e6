"""Reaches the attention workers through a Ray Serve handle: every `.remote` of the front end is here.

Translates Ray's errors into ours, bounds every call that leaves the process, and gives a sequence whose worker was lost
to another one.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

import ray
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle

from actors.ray_shells.host_actor import ExpertHostsClient
from cluster.application import ApplicationId
from cluster.errors import MoesaicError, Overloaded, Unavailable
from cluster.logs import log_event
from cluster.routing.attempts import Attempts
from cluster.routing.failover_gate import FailoverGate, Turn
from cluster.status.experts import ExpertsReport
from cluster.status.host import ExpertHostStatus
from cluster.status.worker import WorkerStatus
from cluster.token_stream.inbox import TokenInbox
from cluster.types import GenerationRequest, RequestId, TokenChunk

_LOG = logging.getLogger(__name__)
_SUBMIT_TIMEOUT_S = (3.0, 6.0, 12.0)  # to be taken by a worker, attempt after attempt: all may be busy
_ANSWER_TIMEOUT_S = 2.0  # to look for all workers, and again for their answers; who asks waits 5 s
_NOT_THERE = (RayError, RayServeException, DeploymentUnavailableError, TimeoutError, asyncio.CancelledError)


class ServeWorkerClient:
    """An `AttentionWorkerClient` over the Serve deployment of attention workers."""

    def __init__(self, handle: DeploymentHandle, *, application: ApplicationId, num_hosts: int = 0) -> None:
        self._handle = handle
        self._hosts = ExpertHostsClient(application, num_hosts)
        self._inbox = TokenInbox(ray.util.get_node_ip_address())
        self._running: dict[RequestId, Attempts] = {}
        self._failover, self._random = FailoverGate(), random.Random()

    async def generate(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk]:
        """Stream one sequence; closing the iterator early stops it in the worker within one step.

        A worker that is lost, or does not take it, is replaced by another one as `Attempts` says: who reads the tokens
        does not notice. Many that lose theirs at once come back a few at a time, in the order in which they came.
        """
        loop = asyncio.get_running_loop()
        attempts = self._running[request.request_id] = Attempts(request, now_s=loop.time())
        turn = Turn(self._failover, loop.time())
        try:
            while True:
                try:
                    async with aclosing(self._attempt(attempts.request)) as chunks:
                        async for chunk in chunks:
                            turn.give_back()
                            attempts.take(chunk)
                            yield chunk
                    return
                except MoesaicError as error:
                    draw = self._random.random()
                    wait_s = attempts.retry(error, now_s=loop.time(), avoid=self._inbox.lost, draw=draw)
                    _log_retry(attempts.request, error)
                await turn.take()
                await asyncio.sleep(wait_s)
        finally:
            turn.give_back()
            self._running.pop(request.request_id, None)

    async def abort(self, request_id: RequestId) -> None:
        """Stop a sequence within one step, whichever attempt it is at."""
        attempts = self._running.get(request_id)
        if attempts is not None:
            self._inbox.close(attempts.request.request_id, abort=True)

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
        """Change every worker's fast expert memory; what one refuses is raised, though others may have changed."""
        return await self._ask_all("set_expert_cache", setting, all_must=True)

    async def _attempt(self, request: GenerationRequest) -> AsyncGenerator[TokenChunk]:
        """One worker's tokens for it."""
        request_id = request.request_id
        self._inbox.open(request_id)
        ended = False
        try:
            worker_id = await self._submit(request)
            await self._inbox.attach(request_id, str(worker_id))
            while not ended:
                chunk = await self._inbox.take(request_id)
                ended = chunk.finish_reason is not None
                yield chunk
        finally:
            self._inbox.close(request_id, abort=not ended)

    async def _ask_all(self, method: str, *args: object, all_must: bool = False) -> tuple[Any, ...]:
        """The answers of all workers, joined.

        Raises:
            Unavailable: none answers in time. MoesaicError: as none answers, or with `all_must` one, says why.
        """
        try:
            # Not `results_async`: there one worker that is cut off makes all of them late.
            async with asyncio.timeout(_ANSWER_TIMEOUT_S):
                calls = await self._handle.broadcast(method, *args)._fetch_replica_results_async()
            waits = [asyncio.wait_for(call.get_async(), _ANSWER_TIMEOUT_S) for call in calls]
            answers = await asyncio.gather(*waits, return_exceptions=True)
        except (TimeoutError, RayError, DeploymentUnavailableError) as error:
            raise Unavailable(f"no attention worker answered {method}: {type(error).__name__}") from error
        good = [answer for answer in answers if not isinstance(answer, BaseException)]
        bad = [answer for answer in answers if isinstance(answer, BaseException)]
        if bad and (all_must or not good):
            raise _translated(bad[0])
        return tuple(part for answer in good for part in answer)

    async def _submit(self, request: GenerationRequest) -> object:
        """Id of the replica that took it."""
        address = await self._inbox.address()
        timeout_s = _SUBMIT_TIMEOUT_S[min(request.attempt, len(_SUBMIT_TIMEOUT_S) - 1)]
        try:
            async with asyncio.timeout(timeout_s):
                return await self._handle.submit.remote(request, address)
        except TimeoutError as error:
            raise Unavailable(f"no attention worker took the request within {timeout_s:.0f} s") from error
        except Exception as error:
            raise _translated(error) from error


def _log_retry(again: GenerationRequest, error: MoesaicError) -> None:
    facts = {"attempt": again.attempt, "num_emitted": len(again.emitted_ids), "reason": error.message}
    log_event(_LOG, logging.INFO, "sequence is tried again", request_id=again.request_id, **facts)


def _translated(error: BaseException) -> BaseException:
    if isinstance(error, RayTaskError):
        cause = error.cause
        return cause if isinstance(cause, MoesaicError) else MoesaicError(f"the attention worker failed: {cause}")
    if isinstance(error, BackPressureError):
        return Overloaded("the attention workers' queues are full; try again later")
    if isinstance(error, _NOT_THERE):
        return Unavailable(f"the attention worker was lost ({type(error).__name__}); try again")
    return error
