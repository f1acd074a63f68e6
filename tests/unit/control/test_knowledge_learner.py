"""From what workers left in the store to knowledge, and what the next scheduler goes on with."""

from __future__ import annotations

import numpy as np
from scheduler_values import LAYERS, NUM_EXPERTS, TOP_K

from cluster.config.sections import SchedulerConfig
from cluster.control.knowledge_learner import KnowledgeLearner
from cluster.semantics.clusters import nearest_cluster
from cluster.semantics.expectation import expected_uses
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, DECODE, no_statistics
from cluster.stats.memory_store import MemoryStore

CONFIG = SchedulerConfig(prompt_clusters=2)


def _prompts(direction: int, count: int) -> list[bytes]:
    """Embeddings near one axis."""
    rng = np.random.default_rng(direction)
    vectors = rng.integers(-6, 7, (count, 4)) + np.eye(4)[direction] * 120
    return [vector.astype(np.int8).tobytes() for vector in vectors]


FIRST, SECOND = _prompts(0, 16), _prompts(1, 16)


class _Case:
    def __init__(self) -> None:
        self.now_s = 0.0
        self.store = MemoryStore(clock=lambda: self.now_s)
        self.learner = self.next_learner()

    def next_learner(self) -> KnowledgeLearner:
        return KnowledgeLearner(self.store, "f", CONFIG, lambda: self.now_s)

    def learn(self, version: int = 1, seen: int = 0) -> Knowledge | None:
        return self.learner.learn(version, top_k=TOP_K, seen_clusters=seen)

    def serve(self, known: Knowledge | None, prompts: list[bytes], experts: list[int]) -> None:
        """A worker has answered these prompts with these experts of every layer."""
        centroids = known.centroids if known else np.empty((0, 0), dtype=np.float32)
        delta = no_statistics(known.clusters_version if known else 0, len(centroids), LAYERS, NUM_EXPERTS)
        for prompt in prompts:
            delta.values[nearest_cluster(centroids, prompt), DECODE, :, experts, COUNT] += 50
        self.store.add_statistics("f", delta, prompts, half_life_s=CONFIG.half_life_s)


def test_kinds_of_prompt_are_found_and_what_each_uses() -> None:
    case = _Case()
    assert case.learn() is None
    case.serve(None, FIRST, [0, 1])
    case.serve(None, SECOND, [2, 3])
    found = case.learn(1)
    assert found is not None
    assert (found.version, len(found.centroids)) == (1, 2)
    assert found.mutual_information < 0.01, "what was counted before is of no kind"
    for _ in range(3):
        case.serve(found, FIRST, [0, 1])
        case.serve(found, SECOND, [2, 3])

    knowledge = case.learn(2)

    assert knowledge is not None
    assert knowledge.clusters_version == found.clusters_version
    assert knowledge.mutual_information > 0.5
    uses = expected_uses(knowledge, FIRST[0])
    assert (uses[:, :2] > 0.8).all()
    np.testing.assert_allclose(uses.sum(axis=1), TOP_K, rtol=1e-5)


def test_what_has_hardly_changed_is_not_told_again() -> None:
    case = _Case()
    case.serve(None, FIRST + SECOND, [0, 1])
    found = case.learn(1)
    assert found is not None
    case.serve(found, FIRST, [0, 1])
    case.learn(2)

    assert case.learn(3) is None
    assert case.learner.statistics is not None


def test_the_next_scheduler_goes_on_with_the_same_clusters() -> None:
    case = _Case()
    case.serve(None, FIRST + SECOND, [0, 1])
    before = case.learn(1)
    assert before is not None

    case.learner = case.next_learner()
    after = case.learn(9, seen=before.clusters_version)

    assert after is not None
    assert (after.version, after.clusters_version) == (9, before.clusters_version)
    np.testing.assert_array_equal(after.centroids, before.centroids)


def test_where_clusters_were_lost_their_number_is_not_used_again() -> None:
    case = _Case()
    case.serve(None, FIRST + SECOND, [0, 1])
    before = case.learn(1)
    assert before is not None
    case.store = MemoryStore(clock=lambda: case.now_s)
    case.learner = case.next_learner()
    case.serve(before, FIRST + SECOND, [0, 1])

    after = case.learn(2, seen=before.clusters_version)

    assert after is not None
    assert after.clusters_version > before.clusters_version


def test_a_restarted_store_is_told_the_clusters_again() -> None:
    case = _Case()
    case.serve(None, FIRST + SECOND, [0, 1])
    found = case.learn(1)
    assert found is not None
    case.store = MemoryStore(clock=lambda: case.now_s)
    case.learner._store = case.store
    case.serve(found, FIRST + SECOND, [0, 1])
    case.now_s += 31

    case.learn(2)

    state = case.store.get_state("f", "clusters")
    assert state is not None
    assert state.version >= found.clusters_version
