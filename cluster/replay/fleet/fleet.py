"""Several attention workers, a router and the scheduler's view of them, in virtual time: routing in replay.

A closed loop: so many clients, each with one request at a time, and the next of a fixed list as soon as that has ended.
Workers step by themselves. Reports are as old as they are live: each worker makes one every `report_s`, in turn, and
the router fetches them every `report_s`.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Protocol

from cluster.replay.fleet.worker import FleetRequest, FleetWorker
from cluster.routing.prefix_memory import block_hashes
from cluster.routing.router import RouterState, RoutingRequest
from cluster.semantics.knowledge import Knowledge
from cluster.status.reports import RoutingView, WorkerReport


class FleetLearner(Protocol):
    """Makes knowledge of what requests used, as the scheduler does of the statistics."""

    def observe(self, request: FleetRequest) -> None:
        """A request has ended."""
        ...

    def knowledge(self) -> Knowledge | None:
        """What is known now."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class FleetSettings:
    """num_clients: requests under way at a time. report_s: seconds between reports. learn_s: between two versions of
    knowledge."""

    num_clients: int
    report_s: float = 1.0
    learn_s: float = 5.0


class Fleet:
    """Takes a list of requests through workers, once."""

    def __init__(
        self, workers: Sequence[FleetWorker], router: RouterState, learner: FleetLearner, settings: FleetSettings
    ) -> None:
        self._workers, self._router, self._learner, self._settings = workers, router, learner, settings
        self._by_name = {worker.report().replica_id: worker for worker in workers}
        self._knowledge: Knowledge | None = None
        self._reports: dict[int, tuple[WorkerReport, float]] = {}
        self._events: list[tuple[float, int, Callable[[float], None]]] = []
        self._order = count()
        self._awaited: set[int] = set()
        self._coming: Iterator[FleetRequest] = iter(())

    def run(self, requests: Sequence[FleetRequest], *, until: int | None = None) -> None:
        """Until the first `until` of them have ended (default: all); the others keep the workers busy meanwhile."""
        self._coming = iter(requests)
        self._awaited = {request.number for request in requests[:until]}
        for place in range(len(self._workers)):
            self._report(place, 0.0)
        self._poll(0.0)
        self._at(self._settings.learn_s, self._learn)
        for _ in range(self._settings.num_clients):
            self._arrive(0.0)
        while self._awaited:
            at_s, _, happen = heapq.heappop(self._events)
            happen(at_s)

    def _at(self, at_s: float, happen: Callable[[float], None]) -> None:
        heapq.heappush(self._events, (at_s, next(self._order), happen))

    def _report(self, place: int, now_s: float) -> None:
        self._reports[place] = (self._workers[place].report(), now_s)
        turn_s = self._settings.report_s * (1 + place) / len(self._workers) if now_s == 0 else self._settings.report_s
        self._at(now_s + turn_s, lambda at_s: self._report(place, at_s))

    def _poll(self, now_s: float) -> None:
        rows = tuple((report, now_s - at_s) for report, at_s in self._reports.values())
        self._router.update(RoutingView(workers=rows, knowledge=self._knowledge), now_s)
        self._at(now_s + self._settings.report_s, self._poll)

    def _learn(self, now_s: float) -> None:
        self._knowledge = self._learner.knowledge()
        if self._knowledge is not None:
            for worker in self._workers:
                worker.set_knowledge(self._knowledge)
        self._at(now_s + self._settings.learn_s, self._learn)

    def _arrive(self, now_s: float) -> None:
        """The next request of a client."""
        request = next(self._coming, None)
        if request is None:
            return
        described = RoutingRequest(
            num_tokens=len(request.prompt_ids),
            max_tokens=request.num_tokens,
            embedding=request.embedding,
            blocks=block_hashes(request.prompt_ids),
        )
        name = self._router.rank(described)[0]
        self._router.note_sent(name, described, now_s)
        worker = self._by_name[name]
        worker.submit(request, now_s)
        if not worker.is_computing:
            self._begin(worker, now_s)

    def _begin(self, worker: FleetWorker, now_s: float) -> None:
        end_s = worker.begin_step(now_s)
        if end_s is not None:
            self._at(end_s, lambda at_s: self._end(worker, at_s))

    def _end(self, worker: FleetWorker, now_s: float) -> None:
        for request in worker.end_step(now_s):
            self._awaited.discard(request.number)
            self._router.note_finished(f"worker-{worker.index}", now_s)
            self._learner.observe(request)
            self._arrive(now_s)
        if not worker.is_computing:
            self._begin(worker, now_s)
