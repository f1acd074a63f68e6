"""Ray Serve's request router of the attention workers: each call's candidates in the order of WorkerChoice.

Only what Ray's alpha API asks for is here, since Serve pickles this module by value into every process with a handle.
The attributes of Ray that it uses are pinned by tests/contracts/test_request_router.py.
"""

from __future__ import annotations

import asyncio
import time
import weakref
from typing import Any

from ray.serve.request_router import PendingRequest, RequestRouter, RunningReplica

from actors.ray_shells.scheduler_client import SchedulerLink
from cluster.application import ApplicationId
from cluster.routing.view_poll import RoutingPoll
from cluster.routing.worker_choice import WorkerChoice
from cluster.types import GenerationRequest


class ExpertRequestRouter(RequestRouter):
    """Runs in the process and event loop of every caller. Decides on its last view; nothing here waits for a call."""

    def initialize_state(self, **kwargs: Any) -> None:
        """Args: those of RequestRouterConfig: routing, application, block_size; poll_s: seconds between two views."""
        self._choice = WorkerChoice(kwargs["routing"], block_size=kwargs["block_size"])
        link = SchedulerLink(ApplicationId(*kwargs["application"]))
        self._poll = RoutingPoll(link, self._choice, interval_s=kwargs["poll_s"])
        self._requests: weakref.WeakKeyDictionary[asyncio.Task[Any], PendingRequest] = weakref.WeakKeyDictionary()

    def update_replicas(self, replicas: list[RunningReplica]) -> None:
        """Replicas have come or gone. Nobody needs views while there is nothing to choose."""
        self._choice.set_replicas([replica.replica_id.unique_id for replica in replicas])
        super().update_replicas(replicas)
        if len(replicas) > 1:
            self._poll.start()
        else:
            self._poll.stop()

    async def choose_replicas(
        self, candidate_replicas: list[RunningReplica], pending_request: PendingRequest | None = None
    ) -> list[list[RunningReplica]]:
        """Every candidate, each a rank of its own: within one rank Serve would choose by its own queue lengths."""
        by_id = {replica.replica_id.unique_id: replica for replica in candidate_replicas}
        request = _generation_request(pending_request)
        order = self._choice.order(list(by_id), request)
        task = asyncio.current_task()
        if task is not None and pending_request is not None:
            if request is not None and len(order) > 1 and self._requests.get(task) is not pending_request:
                self._choice.note_sent(
                    order[0], request, time.monotonic()
                )  # now: others are chosen while Serve asks it
            self._requests[task] = pending_request
        return [[by_id[replica_id]] for replica_id in order]

    def _fulfill_next_pending_request(self, replica: RunningReplica, request_metadata: Any = None) -> None:
        """Give the replica to the request it was chosen for, and to no other.

        Ray finds the request by its internal id, which all calls share that one HTTP request makes: of the choices of
        one answer (n > 1) only the first would ever be routed. Here the task that routed it knows it.
        """
        task = asyncio.current_task()
        request = None if task is None else self._requests.get(task)
        if request is None:
            super()._fulfill_next_pending_request(replica, request_metadata)
        elif not request.future.done():
            self._record_queue_wait_time(request)
            request.future.set_result(replica)
            self._remove_pending_request_from_indices(request)


def _generation_request(pending: PendingRequest | None) -> GenerationRequest | None:
    """What is to be generated, if that is what the call is about."""
    first = pending.args[0] if pending is not None and pending.args else None
    return first if isinstance(first, GenerationRequest) else None
