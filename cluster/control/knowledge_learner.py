"""Makes knowledge of prompts from what workers left in the shared store: clusters first, then what each of them uses.

Talks to the store; all else is decided in cluster/semantics. Clusters are remembered in the store under their version,
so that the next scheduler goes on with the same ones; knowledge itself is not: it follows from clusters and statistics.
"""

from __future__ import annotations

import logging
from collections.abc import Callable

import numpy as np

from cluster.config.sections import SchedulerConfig
from cluster.logs import log_event
from cluster.protocols import StateStore
from cluster.semantics.clusters import Clusters
from cluster.semantics.expectation import make_knowledge
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import ExpertStatistics

_LOG = logging.getLogger(__name__)
_CLUSTERS = "clusters"
_FIT_EVERY_S = 30.0
_FIT_GROWTH = 1.5  # so many times the prompts there were at the last fit do not wait for the next one
_NEWS = 0.02  # of all expected uses have moved: worth a new version


class KnowledgeLearner:
    """One scheduler's. Called by one thread; raises ConnectionError while the store cannot be read."""

    def __init__(
        self, store: StateStore, fingerprint: str, config: SchedulerConfig, clock: Callable[[], float]
    ) -> None:
        self._store = store
        self._fingerprint = fingerprint
        self._config = config
        self._clock = clock
        self._clusters: Clusters | None = None
        self._fitted_s, self._num_fitted = 0.0, 0
        self._last: Knowledge | None = None
        self._statistics: ExpertStatistics | None = None

    @property
    def statistics(self) -> ExpertStatistics | None:
        """The last that were read; None before the first."""
        return self._statistics

    def learn(self, version: int, *, top_k: int, seen_clusters: int) -> Knowledge | None:
        """Knowledge as `version`; None if there is none, or it has hardly changed since it was made last.

        Args:
            top_k: experts per token.
            seen_clusters: highest version of clusters that a worker counts by; numbers are not used twice.
        """
        clusters = self._clusters or self._restored(seen_clusters)
        self._clusters = clusters
        self._refit(clusters)
        statistics = self._store.statistics(self._fingerprint, clusters.version, half_life_s=self._config.half_life_s)
        if statistics is None:
            return None
        self._statistics = statistics
        if not len(clusters.centroids):
            return None
        knowledge = make_knowledge(statistics, clusters, version=version, top_k=top_k)
        if not knowledge.is_finite:
            log_event(_LOG, logging.ERROR, "knowledge that is not finite was left out", version=version)
            return None
        if self._last is not None and not _is_news(knowledge, self._last):
            return None
        self._last = knowledge
        return knowledge

    def _restored(self, seen_clusters: int) -> Clusters:
        state = self._store.get_state(self._fingerprint, _CLUSTERS)
        if state is not None and state.version >= seen_clusters:
            try:
                return Clusters.from_bytes(state.blob, self._config.prompt_clusters)
            except (ValueError, KeyError, OSError) as error:
                log_event(_LOG, logging.WARNING, "remembered clusters cannot be read", reason=repr(error))
        return Clusters(self._config.prompt_clusters, version=max(seen_clusters, state.version if state else 0))

    def _refit(self, clusters: Clusters) -> None:
        """Fit anew if prompts have changed, and carry over what was counted."""
        prompts = self._store.recent_prompts(self._fingerprint)
        now_s = self._clock()
        if now_s - self._fitted_s < _FIT_EVERY_S and len(prompts) < _FIT_GROWTH * self._num_fitted:
            return
        self._fitted_s, self._num_fitted = now_s, max(len(prompts), 1)
        before = clusters.version
        clusters.observe(prompts)
        if clusters.fit() != before:
            half_life_s = self._config.half_life_s
            counted = self._store.statistics(self._fingerprint, before, half_life_s=half_life_s)
            if counted is not None:
                carried = clusters.carry_over(counted)
                self._store.add_statistics(self._fingerprint, carried, (), half_life_s=half_life_s)
            log_event(_LOG, logging.INFO, "prompts clustered anew", version=clusters.version, prompts=len(prompts))
        if len(clusters.centroids):  # also unchanged ones: a store that was restarted has forgotten them
            self._store.put_state(self._fingerprint, _CLUSTERS, clusters.to_bytes(), clusters.version)


def _is_news(knowledge: Knowledge, last: Knowledge) -> bool:
    """Whether what workers and routers have is not good enough any more."""
    if knowledge.clusters_version != last.clusters_version or knowledge.uses.shape != last.uses.shape:
        return True
    return float(np.abs(knowledge.uses - last.uses).sum()) > _NEWS * float(last.uses.sum())
