"""What the scheduler of a replayed fleet knows of prompts: from the requests that ended before, as live.

Shapes: L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

import numpy as np

from cluster.policies.signals import Grid
from cluster.replay.fleet.worker import FleetRequest
from cluster.semantics.clusters import Clusters
from cluster.semantics.expectation import make_knowledge
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, DECODE, ExpertStatistics, no_statistics

_RECENT_PROMPTS = 512


class OnlineLearner:
    """Clusters of recent prompts, and what their answers used; at first only what `past` says, if anything."""

    def __init__(self, grid: Grid, max_clusters: int, past: Sequence[FleetRequest] = ()) -> None:
        self._grid = grid
        self._clusters = Clusters(max_clusters)
        self._recent: deque[bytes] = deque(maxlen=_RECENT_PROMPTS)
        self._statistics = no_statistics(0, 0, grid.layers, grid.num_experts)
        self._version = 0
        self._recent.extend(request.embedding for request in past)
        self.knowledge()  # clusters first, so that what the past used is counted by them
        for request in past:
            self._count(request)

    def observe(self, request: FleetRequest) -> None:
        """A request has ended."""
        self._recent.append(request.embedding)
        self._count(request)

    def _count(self, request: FleetRequest) -> None:
        self._statistics.values[self._clusters.assign(request.embedding), DECODE, :, :, COUNT] += request.used

    def knowledge(self) -> Knowledge | None:
        """What is known now; None before there are clusters."""
        self._clusters.observe(tuple(self._recent))
        if self._clusters.fit() != self._statistics.clusters_version:
            self._statistics = self._clusters.carry_over(self._statistics)
        if not len(self._clusters.centroids):
            return None
        self._version += 1
        return make_knowledge(self._statistics, self._clusters, version=self._version, top_k=self._grid.top_k)


class DomainLearner:
    """The oracle: what each domain uses is known, from other requests of it; prompts say which is theirs."""

    def __init__(self, grid: Grid, past: Sequence[FleetRequest]) -> None:
        self._domains = sorted({request.domain for request in past})
        clusters = Clusters(len(self._domains), version=1)
        clusters.centroids = np.eye(len(self._domains), dtype=np.float32)
        statistics: ExpertStatistics = no_statistics(1, len(self._domains), grid.layers, grid.num_experts)
        for request in past:
            statistics.values[self._domains.index(request.domain), DECODE, :, :, COUNT] += request.used
        self._known = make_knowledge(statistics, clusters, version=1, top_k=grid.top_k)

    def embedding(self, domain: str) -> bytes:
        """That of every prompt of a domain."""
        return (127 * np.eye(len(self._domains), dtype=np.int8)[self._domains.index(domain)]).tobytes()

    def observe(self, request: FleetRequest) -> None:
        """Known before."""

    def knowledge(self) -> Knowledge | None:
        return self._known
