"""One replay of benchmark `routing`: a fleet, a router, a stream of requests, and what came of it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from benchmarks.routing.groups import FixedGroups, group_domains
from benchmarks.routing.requests import Workload, fresh
from cluster.policies.build import PolicyContext, build_policies
from cluster.replay.fleet.fleet import Fleet, FleetSettings
from cluster.replay.fleet.learner import DomainLearner, OnlineLearner
from cluster.replay.fleet.worker import FleetRequest, FleetWorker
from cluster.replay.machine import Machine
from cluster.routing.router import RouterState
from cluster.semantics.co_batching import CoBatching

NUM_WORKERS = 4
DOMAIN = "true domain"  # the semantic router, told the domain of every prompt and what each domain uses
GROUPS = "domain groups"  # every domain has its worker, whatever waits there: a bound
EXPERT_BYTES = 32 * 102_400
LINK_BYTES_PER_S = 4e9
CLUSTERS = 16
_CLIENTS_PER_SLOT = 2  # half of the requests wait: a server with work to do, and a choice to make
_NUM_FILLING = 72  # requests after the last measured one, so that it ends in company


@dataclass(frozen=True, slots=True, kw_only=True)
class Cell:
    """cache: share of the experts that a worker holds. concurrent: sequences that run on a worker at a time."""

    policy: str = "moesaic"
    cache: float = 0.5
    concurrent: int = 8
    routing: str = "semantic"
    co_batching: bool = False
    loop: bool = False

    @property
    def label(self) -> str:
        """Of the way of routing."""
        return self.routing + (" + co-batching" if self.co_batching else "") + (" + loop" if self.loop else "")


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """loads: experts loaded for decode steps, over tokens generated; prompt_loads: those for prompts alone, the same.

    open_ratio, tokens_ratio: of the worker with most over the mean, all requests running or waiting there while the
    measured ones arrived, and tokens generated for these. wait_s: 95% of the requests waited less for a slot (virtual
    time).
    """

    loads: float
    prompt_loads: float
    open_ratio: float
    tokens_ratio: float
    tokens_per_s: float
    wait_s: float
    num_tokens: int


def replay(cell: Cell, work: Workload, *, seed: int) -> Figures:
    """Warm up with the requests of the past, measure the others. The order depends on the seed alone."""
    rng = np.random.default_rng(seed)
    past = [work.past[i] for i in rng.permutation(len(work.past))]
    measured = [work.measured[i] for i in rng.permutation(len(work.measured))]
    stream = [*past, *measured, *past[:_NUM_FILLING]]
    requests = run_stream(cell, work, stream, until=len(past) + len(measured), seed=seed, known=work.past)
    return figures(requests, slice(len(past), len(past) + len(measured)))


def run_stream(
    cell: Cell,
    work: Workload,
    stream: Sequence[FleetRequest],
    *,
    until: int,
    seed: int,
    known: Sequence[FleetRequest] = (),
) -> list[FleetRequest]:
    """Take requests through a fleet in this order until the first `until` have ended; all of them, as they are then.

    Args: known: requests of which the statistics tell at the beginning.
    """
    learner = DomainLearner(work.grid, work.past) if cell.routing in (DOMAIN, GROUPS) else None
    learner = learner or OnlineLearner(work.grid, CLUSTERS, known)
    requests = [
        fresh(template, number, learner.embedding(template.domain) if isinstance(learner, DomainLearner) else None)
        for number, template in enumerate(stream)
    ]
    router = _router(cell, work, learner, seed)
    clients = FleetSettings(num_clients=_CLIENTS_PER_SLOT * NUM_WORKERS * cell.concurrent)
    Fleet([_worker(cell, work, index) for index in range(NUM_WORKERS)], router, learner, clients).run(
        requests, until=until
    )
    return requests


def _router(cell: Cell, work: Workload, learner: DomainLearner | OnlineLearner, seed: int) -> RouterState:
    if cell.routing == GROUPS:
        known = learner.knowledge()
        assert known is not None, "of the past"
        uses = known.uses.reshape(len(known.uses), -1)
        return FixedGroups(group_domains(uses, NUM_WORKERS, int(cell.cache * work.grid.size)))
    return RouterState("semantic" if cell.routing == DOMAIN else cell.routing, np.random.default_rng(seed))


def figures(stream: Sequence[FleetRequest], measured: slice) -> Figures:
    """Of the measured ones of a stream, which have ended."""
    requests = stream[measured]
    tokens = np.zeros(NUM_WORKERS)
    for request in requests:
        tokens[request.worker] += request.num_tokens
    open_s = _open_s(stream, min(r.arrived_s for r in requests), max(r.arrived_s for r in requests))
    num_tokens = int(tokens.sum())
    took_s = max(request.ended_s for request in requests) - min(request.arrived_s for request in requests)
    return Figures(
        loads=sum(request.decode_loads for request in requests) / num_tokens,
        prompt_loads=sum(request.prefill_loads for request in requests) / num_tokens,
        open_ratio=float(open_s.max() / open_s.mean()),
        tokens_ratio=float(tokens.max() / tokens.mean()),
        tokens_per_s=num_tokens / took_s,
        wait_s=float(np.quantile([request.started_s - request.arrived_s for request in requests], 0.95)),
        num_tokens=num_tokens,
    )


def _open_s(stream: Sequence[FleetRequest], begin_s: float, end_s: float) -> np.ndarray:
    """Seconds that requests were running or waiting at each worker between two times, all requests together."""
    open_s = np.zeros(NUM_WORKERS)
    for request in stream:
        if request.worker >= 0:
            last_s = request.ended_s if request.ended_s > 0 else end_s
            open_s[request.worker] += max(0.0, min(last_s, end_s) - max(request.arrived_s, begin_s))
    return open_s


def _worker(cell: Cell, work: Workload, index: int) -> FleetWorker:
    num_slots = int(cell.cache * work.grid.size)
    co_batching = CoBatching() if cell.co_batching else CoBatching(max_overtaken=0)
    learned = copy.deepcopy(work.learned) if cell.policy == "moesaic" else None
    mix = co_batching.mix if cell.loop else None
    context = PolicyContext(grid=work.grid, num_slots=num_slots, embedding_dim=work.dim, learned=learned, mix=mix)
    policies = build_policies(cell.policy, context)
    return FleetWorker(
        index,
        work.grid,
        policies,
        Machine(num_slots=num_slots, expert_bytes=EXPERT_BYTES, link_bytes_per_s=LINK_BYTES_PER_S),
        max_running=cell.concurrent,
        max_queue=10**6,
        co_batching=co_batching,
    )
