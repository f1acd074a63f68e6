"""Which Serve replicas a request goes to, best first: the pure ranking, and what to do where it says nothing.

The ranking knows workers that reported; Serve knows replicas. One without a report has just come: it is taken for idle
but for what was sent to it, so it gets its share at once, after idle ones that are known. One that the ranking left out
and one that the request avoids come last, in that order: somebody must always be asked, for only a worker's own
admission refuses a request with a reason. Knows reports and requests; knows no Ray.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from cluster.errors import MoesaicError
from cluster.routing.prefix_memory import block_hashes
from cluster.routing.router import RouterState, RoutingRequest, RoutingSettings
from cluster.semantics.knowledge import Knowledge
from cluster.status.reports import RoutingView
from cluster.types import GenerationRequest


class WorkerChoice:
    """One caller's choices. Times in seconds of one clock that only grows; not for several threads.

    >>> from cluster.status.reports import WorkerReport
    >>> from cluster.types import SamplingParams, StartupPhase
    >>> facts = {"node_id": "", "phase": StartupPhase.READY, "max_open": 8}
    >>> busy = WorkerReport(worker_id="a", replica_id="a", num_running=3, **facts)
    >>> idle = WorkerReport(worker_id="b", replica_id="b", num_running=1, **facts)
    >>> choice = WorkerChoice("least-loaded", block_size=16)
    >>> choice.update(RoutingView(workers=((busy, 0.1), (idle, 0.2)), knowledge=None), now_s=0.0)
    >>> request = GenerationRequest(request_id="r", prompt_ids=(1, 2), sampling=SamplingParams(max_tokens=4))
    >>> choice.order(["a", "b"], request)
    ['b', 'a']
    """

    def __init__(self, policy: str, *, block_size: int, seed: int | None = None) -> None:
        """Args: policy: as SchedulerConfig.routing. block_size: tokens of a KV block. seed: None draws one."""
        self.known_version = 0
        self._settings = RoutingSettings(block_size=block_size)
        self._state = RouterState(policy, np.random.default_rng(seed), self._settings)
        self._random = random.Random(seed)
        self._knowledge: Knowledge | None = None
        self._reported: frozenset[str] = frozenset()
        self._num_sent: dict[str, int] = {}
        self._num_sent_unknown: dict[str, int] = {}  # to replicas that have not reported
        self._described: tuple[GenerationRequest, RoutingRequest] | None = None  # of the last request

    def update(self, view: RoutingView, now_s: float) -> None:
        """Take a new view. Its knowledge may be left out where it is what is known already.

        A view without workers is that of a scheduler that has only just started: the one before it still says more.
        """
        if view.knowledge is not None and view.knowledge.version > self.known_version:
            self._knowledge, self.known_version = view.knowledge, view.knowledge.version
        if not view.workers and self._reported:
            return
        self._reported = frozenset(report.replica_id for report, _ in view.workers)
        self._num_sent_unknown = {r: n for r, n in self._num_sent_unknown.items() if r not in self._reported}
        self._state.update(replace(view, knowledge=self._knowledge), now_s)

    def order(self, replica_ids: Sequence[str], request: GenerationRequest | None) -> list[str]:
        """All of `replica_ids`, best first. Args: request: None for a call that any replica can answer."""
        if len(replica_ids) < 2:
            return list(replica_ids)
        if request is None:
            return self._random.sample(replica_ids, len(replica_ids))
        ranked = self._ranked(request)
        place = {replica_id: i for i, replica_id in enumerate(ranked)}
        avoided = frozenset(request.avoid)
        fewest = self._fewest_open(ranked)
        # The sort is stable: replicas of which nothing is known take turns, equal ones in random order.
        turns = self._random.sample(replica_ids, len(replica_ids))
        turns.sort(key=lambda replica_id: self._num_sent.get(replica_id, 0))
        last = len(place)

        def key(replica_id: str) -> tuple[bool, bool, int, bool]:
            is_unknown = replica_id not in self._reported
            is_idle_newcomer = is_unknown and self._num_sent_unknown.get(replica_id, 0) < fewest
            return replica_id in avoided, not is_idle_newcomer, place.get(replica_id, last), is_unknown

        return sorted(turns, key=key)

    def note_sent(self, replica_id: str, request: GenerationRequest, now_s: float) -> None:
        """The request was taken there."""
        self._num_sent[replica_id] = self._num_sent.get(replica_id, 0) + 1
        if replica_id not in self._reported:
            self._num_sent_unknown[replica_id] = self._num_sent_unknown.get(replica_id, 0) + 1
        if self._reported:
            self._state.note_sent(replica_id, self._description(request), now_s)

    def set_replicas(self, replica_ids: Sequence[str]) -> None:
        """These replicas there are now."""
        fewest = min(self._num_sent.values(), default=0)
        # A new one starts level with the others, or it would get everything until it has caught up.
        self._num_sent = {replica_id: self._num_sent.get(replica_id, fewest) for replica_id in replica_ids}

    def _fewest_open(self, ranked: Sequence[str]) -> float:
        """Requests of the best of those that are known; of any of them if none could be ranked."""
        open_ = self._state.num_open()
        if ranked:
            return open_[ranked[0]]
        return min(open_.values(), default=0.0)

    def _ranked(self, request: GenerationRequest) -> list[str]:
        if not self._reported:
            return []
        try:
            return self._state.rank(self._description(request))
        except MoesaicError:  # none fits by the last view: it may be old, so a worker is asked all the same
            return []

    def _description(self, request: GenerationRequest) -> RoutingRequest:
        if self._described is not None and self._described[0] is request:
            return self._described[1]
        tokens = (*request.prompt_ids, *request.emitted_ids)
        described = RoutingRequest(
            num_tokens=len(tokens),
            max_tokens=max(1, request.sampling.max_tokens - len(request.emitted_ids)),
            embedding=request.embedding,
            blocks=block_hashes(tokens, self._settings.block_size),
            avoid=frozenset(request.avoid),
        )
        self._described = request, described
        return described
