"""A replayed fleet: every load is booked once, every request ends, and routing by experts separates kinds of prompt."""

from __future__ import annotations

import numpy as np
import pytest
from knowledge_builders import embedding_of

from cluster.policies.build import PolicyContext, build_policies
from cluster.policies.signals import Grid
from cluster.replay.fleet.fleet import Fleet, FleetSettings
from cluster.replay.fleet.learner import DomainLearner, OnlineLearner
from cluster.replay.fleet.worker import FleetRequest, FleetWorker
from cluster.replay.machine import Machine
from cluster.replay.schedule import StepPart
from cluster.routing.router import RouterState
from cluster.semantics.co_batching import CoBatching

GRID = Grid((0, 1, 2), 12, 2)
STEPS = 12


def _requests(num: int, *, kinds: int = 2) -> list[FleetRequest]:
    """Kind g uses the experts from 12 g / kinds on, some of them at random in every step."""
    rng = np.random.default_rng(0)
    width = GRID.num_experts // kinds
    requests: list[FleetRequest] = []
    for number in range(num):
        kind = int(rng.integers(kinds))
        parts = [_part(rng, kind * width, width, is_decode=step > 0) for step in range(STEPS + 1)]
        used = np.sum([part.counts for part in parts if part.is_decode], axis=0)
        requests.append(FleetRequest(number, str(kind), parts, embedding_of(kind), tuple(range(20)), used))
    return requests


def _part(rng: np.random.Generator, first: int, width: int, *, is_decode: bool) -> StepPart:
    counts = np.zeros((GRID.num_layers, GRID.num_experts), dtype=np.float32)
    for row in range(GRID.num_layers):
        counts[row, first + rng.choice(width, GRID.top_k, replace=False)] = 1
    probs = counts / GRID.top_k
    return StepPart(probs, counts, probs[1:], np.ones(4, np.float32), 1 if is_decode else 20, is_decode)


def _run(
    requests: list[FleetRequest], routing: str, *, co_batching: bool = False, policy: str = "lfu", max_running: int = 3
) -> list[FleetWorker]:
    machine = Machine(num_slots=GRID.size // 2, expert_bytes=10**6, link_bytes_per_s=1e9)
    workers = [
        FleetWorker(
            index,
            GRID,
            build_policies(policy, PolicyContext(grid=GRID, num_slots=machine.num_slots, embedding_dim=4)),
            machine,
            max_running=max_running,
            max_queue=100,
            co_batching=CoBatching() if co_batching else CoBatching(max_overtaken=0),
        )
        for index in range(2)
    ]
    router = RouterState(routing, np.random.default_rng(0))
    learner = OnlineLearner(GRID, 2)
    Fleet(workers, router, learner, FleetSettings(num_clients=12, report_s=0.02, learn_s=0.05)).run(requests)
    return workers


@pytest.mark.parametrize("policy", ["lru", "moesaic"])
def test_every_load_is_booked_once_and_every_request_ends(policy: str) -> None:
    requests = _requests(40)
    workers = _run(requests, "semantic", co_batching=True, policy=policy)

    assert all(request.ended_s > request.started_s >= request.arrived_s for request in requests)
    assert sum(worker.counts.tokens for worker in workers) == 40 * STEPS
    booked = sum(request.decode_loads + request.prefill_loads for request in requests)
    assert booked == pytest.approx(sum(worker.counts.loads for worker in workers))
    open_s = sum(request.ended_s - request.arrived_s for request in requests)
    assert sum(worker.counts.open_s for worker in workers) == pytest.approx(open_s)


def test_routing_by_experts_separates_kinds_of_prompt_and_saves_loads() -> None:
    loads: dict[str, float] = {}
    for routing in ("random", "least-loaded", "semantic"):
        requests = _requests(160)
        _run(requests, routing)
        later = requests[60:]
        loads[routing] = sum(request.decode_loads for request in later)
        if routing == "semantic":
            home = [np.mean([request.worker for request in later if request.domain == kind]) for kind in "01"]
            assert abs(home[0] - home[1]) > 0.3, "each kind has a worker of its own, but for a few that share the load"

    assert loads["semantic"] < 0.85 * min(loads["random"], loads["least-loaded"])


def test_co_batching_saves_loads_where_kinds_share_a_worker() -> None:
    loads: list[float] = []
    for co_batching in (False, True):
        requests = _requests(160, kinds=4)
        _run(requests, "random", co_batching=co_batching)
        loads.append(sum(request.decode_loads for request in requests[60:]))

    assert loads[1] < 0.9 * loads[0]


def test_the_same_seed_gives_the_same_run() -> None:
    one, other = _requests(30), _requests(30)
    _run(one, "semantic")
    _run(other, "semantic")

    assert [(r.worker, r.ended_s) for r in one] == [(r.worker, r.ended_s) for r in other]


def test_the_oracle_knows_each_domain_by_its_name() -> None:
    learner = DomainLearner(GRID, _requests(30))
    known = learner.knowledge()

    assert known is not None
    assert known.uses[0, :, :6].sum() > 0.9 * known.uses[0].sum()
    assert learner.embedding("0") != learner.embedding("1")
