"""Semantic routing as a whole: what workers report, the scheduler learns and a router ranks makes them load less.

Scheduler, learner, store and router are the real ones, without Ray; workers are memories of experts that answer
requests and report. The same requests with scores that mean nothing have to load clearly more, or the measure is void.
"""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Iterator

import numpy as np
import pytest

from cluster.config.sections import SchedulerConfig
from cluster.control.knowledge_learner import KnowledgeLearner
from cluster.control.scheduler import Scheduler
from cluster.routing.router import RouterState, RoutingRequest
from cluster.routing.worker_choice import WorkerChoice
from cluster.semantics.clusters import nearest_cluster
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.statistics import COUNT, DECODE, no_statistics
from cluster.stats.memory_store import MemoryStore
from cluster.status.reports import WorkerReport
from cluster.types import GenerationRequest, RequestId, SamplingParams, StartupPhase, Tier

LAYERS, NUM_EXPERTS, TOP_K, KINDS = (0, 1), 16, 2, 4
WIDTH = NUM_EXPERTS // KINDS  # experts of a layer that a kind of prompt uses
CAPACITY = len(LAYERS) * NUM_EXPERTS // 2  # of a worker's memory: two kinds of four
TAUGHT, MEASURED = 80, 120


class _Worker:
    """A memory of experts, the longest unused of which goes first; counts what it loads and what prompts use."""

    def __init__(self, name: str, store: MemoryStore) -> None:
        self.name, self.loads = name, 0
        self._store = store
        self._memory: OrderedDict[int, None] = OrderedDict()
        self._known: Knowledge | None = None

    def answer(self, kind: int, embedding: bytes) -> None:
        experts = [kind * WIDTH + i for i in range(WIDTH)]
        for flat in (layer * NUM_EXPERTS + expert for layer in LAYERS for expert in experts):
            self.loads += flat not in self._memory
            self._memory[flat] = None
            self._memory.move_to_end(flat)
            if len(self._memory) > CAPACITY:
                self._memory.popitem(last=False)
        centroids = self._known.centroids if self._known else np.empty((0, 0), dtype=np.float32)
        version = self._known.clusters_version if self._known else 0
        delta = no_statistics(version, len(centroids), LAYERS, NUM_EXPERTS)
        delta.values[nearest_cluster(centroids, embedding), DECODE, :, experts, COUNT] += 20
        self._store.add_statistics("f", delta, [embedding], half_life_s=3600.0)

    def report_to(self, scheduler: Scheduler) -> None:
        present = np.zeros(len(LAYERS) * NUM_EXPERTS, dtype=np.bool_)
        present[list(self._memory)] = True
        directives = scheduler.report_worker(
            WorkerReport(
                worker_id=self.name,
                replica_id=self.name,
                node_id="node",
                phase=StartupPhase.READY,
                layers=LAYERS,
                num_experts=NUM_EXPERTS,
                top_k=TOP_K,
                max_open=64,
                step_s=0.01,
                prefill_token_s=0.001,
                resident=np.packbits(present).tobytes(),
                miss_s={Tier.DISK: 0.02},
                knowledge_version=self._known.version if self._known else 0,
                clusters_version=self._known.clusters_version if self._known else 0,
            )
        )
        self._known = directives.knowledge or self._known


def _requests(num: int) -> Iterator[tuple[int, GenerationRequest]]:
    """Prompts of four kinds in random order, each near its kind's axis."""
    rng = np.random.default_rng(0)
    for number in range(num):
        kind = int(rng.integers(KINDS))
        vector = rng.integers(-6, 7, 8) + np.eye(8)[kind] * 120
        yield (
            kind,
            GenerationRequest(
                request_id=RequestId(str(number)),
                prompt_ids=(1, 2, 3 + number),
                sampling=SamplingParams(max_tokens=16),
                embedding=vector.astype(np.int8).tobytes(),
            ),
        )


def _loads(routing: str) -> float:
    """Experts loaded for a request, once routing has been taught."""
    now_s = 0.0
    store, config = MemoryStore(clock=lambda: now_s), SchedulerConfig(prompt_clusters=KINDS)
    learner = KnowledgeLearner(store, "f", config, lambda: now_s)
    scheduler = Scheduler(config, fingerprint="f", store=store, learner=learner, placer=None, clock=lambda: now_s)
    workers = {name: _Worker(name, store) for name in ("w0", "w1")}
    choice = WorkerChoice(routing, block_size=16, seed=0)
    before = 0
    for number, (kind, request) in enumerate(_requests(TAUGHT + MEASURED)):
        if number == TAUGHT:
            before = sum(worker.loads for worker in workers.values())
        now_s += 1.5
        for worker in workers.values():
            worker.report_to(scheduler)
        scheduler.turn()
        choice.update(scheduler.routing_view(choice.known_version), now_s)
        chosen = choice.order(list(workers), request)[0]
        choice.note_sent(chosen, request, now_s)
        workers[chosen].answer(kind, request.embedding)
    return (sum(worker.loads for worker in workers.values()) - before) / MEASURED


@pytest.fixture(scope="module")
def semantic() -> float:
    return _loads("semantic")


@pytest.mark.parametrize("routing", ["random", "least-loaded"])
def test_routing_by_meaning_loads_clearly_less_than_other_policies(semantic: float, routing: str) -> None:
    assert semantic < 0.3 * _loads(routing)


def test_scores_that_mean_nothing_load_clearly_more(semantic: float, monkeypatch: pytest.MonkeyPatch) -> None:
    shuffle, rank = random.Random(0), RouterState.rank

    def shuffled(state: RouterState, request: RoutingRequest) -> list[str]:
        order = list(rank(state, request))
        shuffle.shuffle(order)
        return order

    monkeypatch.setattr(RouterState, "rank", shuffled)

    assert semantic < 0.3 * _loads("semantic")


def test_prompts_without_meaning_load_clearly_more(semantic: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also what a prompt means has to reach the ranking: embeddings of other prompts are no use."""
    shuffle, rank = np.random.default_rng(1), RouterState.rank

    def confused(state: RouterState, request: RoutingRequest) -> list[str]:
        vector = shuffle.integers(-6, 7, 8) + np.eye(8)[int(shuffle.integers(KINDS))] * 120
        return rank(state, _with_embedding(request, vector.astype(np.int8).tobytes()))

    monkeypatch.setattr(RouterState, "rank", confused)

    assert semantic < 0.3 * _loads("semantic")


def _with_embedding(request: RoutingRequest, embedding: bytes) -> RoutingRequest:
    return RoutingRequest(
        num_tokens=request.num_tokens,
        max_tokens=request.max_tokens,
        embedding=embedding,
        blocks=request.blocks,
        avoid=request.avoid,
    )
