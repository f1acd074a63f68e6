"""Which attention worker takes a request: filter, score, pick. Pure: view, request, clock and random numbers are given.

Filter. Workers that are not ready, full, or that the request avoids are never taken; those that make no progress or
have not reported lately only if no other is left. Of the rest, those with more than their share of requests stand
back (`imbalance`): affinity alone would send a popular kind of prompt to one worker for ever.

Score. The milliseconds that taking the request there makes requests wait:

    queue    until a slot is free and the prompts before it are computed;
  + worker   what any prompt costs there: to compute, in times that the worker measured, and to wait for the experts
             that prompts use on average;
  + experts  sum over (layer, expert) of (P(expert | prompt) - P(expert)) x (1 - resident there) x measured cost of the
             tier it would come from, over the tokens expected, for each of the sequences that wait together for a load;
  - prefix   prompt tokens in the KV cache there x the time of a prompt token.

Queue and worker count as long as somewhere nobody waits. Where all queue, every worker gets its share, whatever it
costs: then who waits where is zero-sum, and all that is left to choose is which prompts go where. What workers measure
wavers with their neighbours on a machine, by more than prompts differ, so one worker counts as slower than another
only from `slower` times on: else one would always be preferred until it has its share, and kinds would not part.

P comes from the clusters of past prompts (cluster/semantics). Resident is what is now as far as it stays, and what the
requests there make of the memory as far as it changes while the answer lasts (request_mix.py): that is what separates
kinds of prompt, since a worker with many requests of a kind attracts the next one. The sum is scaled by what workers
really waited for experts over what it would have said (Calibration): sequences share loads, prefetch hides them.

Pick. Workers within `band` of the best are equal: of two drawn from them the less loaded one is first (power of two
choices, Mitzenmacher 2001), so that routers that do not know of each other do not all choose the same. Now and then
(`exploration`) load alone decides, so that what is believed of a worker is put to the test.

A view is as old as its reports. What this router sent since they do not contain: it counts as waiting there, and for
what the requests there use.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from cluster.errors import Overloaded, Unavailable
from cluster.routing.cost import Calibration, SentRequest, SentSince, expected_absence
from cluster.routing.prefix_memory import DEFAULT_BLOCK_SIZE, PrefixMemory
from cluster.routing.worker_table import WorkerTable
from cluster.semantics.expectation import expected_uses
from cluster.semantics.knowledge import Knowledge
from cluster.semantics.request_mix import RequestMix
from cluster.status.reports import RoutingView, WorkerReport


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingRequest:
    """What of a request its routing depends on.

    embedding: as in GenerationRequest; empty when unknown. num_tokens: of the prompt, with tokens emitted before.
    max_tokens: still to be generated, at most. blocks: prefix_memory.block_hashes of the prompt. avoid: replica ids.
    """

    num_tokens: int
    max_tokens: int
    embedding: bytes = b""
    blocks: tuple[int, ...] = ()
    avoid: frozenset[str] = frozenset()


@dataclass(frozen=True, slots=True, kw_only=True)
class RoutingSettings:
    """Free settings of a router.

    band: share of what an answer costs anyway. slower: time of a worker over the fastest's. imbalance: requests of a
    worker over the mean. exploration: share of requests. expected_tokens: what an answer is taken to have at most.
    block_size: tokens of a KV block. prefix_blocks: how many are remembered. matched_share: of a prompt, for
    prefix-affinity to follow it.
    """

    band: float = 0.002
    slower: float = 2.0
    imbalance: float = 1.25
    exploration: float = 0.02
    expected_tokens: int = 128
    block_size: int = DEFAULT_BLOCK_SIZE
    prefix_blocks: int = 65_536
    matched_share: float = 0.1


class RouterState:
    """One router: the last view, what it sent since, and how it chooses.

    `update` with every view; `rank` for a request; `note_sent` once it went somewhere, `note_finished` when it is over.
    Times in seconds on any one clock of the caller that only grows.
    """

    def __init__(self, policy: str, rng: np.random.Generator, settings: RoutingSettings = RoutingSettings()) -> None:
        """Args: policy: as SchedulerConfig.routing: semantic, random, least-loaded or prefix-affinity."""
        choosers: dict[str, Callable[[RoutingRequest, np.ndarray], np.ndarray]] = {
            "semantic": self._by_cost,
            "random": self._at_random,
            "least-loaded": self._by_load,
            "prefix-affinity": self._by_prefix,
        }
        self.settings = settings
        self._choose = choosers[policy]
        self._rng = rng
        self._table = WorkerTable(RoutingView(workers=(), knowledge=None), 0.0)
        self._knowledge: Knowledge | None = None
        self._calibration = Calibration()
        self._sent = SentSince()
        self._prefixes = PrefixMemory(settings.prefix_blocks)
        self._mixes: dict[str, RequestMix] = {}
        self._absent_ms = np.zeros((0, 0), dtype=np.float32)

    def update(self, view: RoutingView, now_s: float) -> None:
        """Take a new view of the workers."""
        table = WorkerTable(view, now_s)
        gone = frozenset(self._table.replica_ids) - frozenset(table.replica_ids)
        if gone:
            self._prefixes.forget(gone)
        self._knowledge = view.knowledge
        if view.knowledge is not None:
            self._calibration.compare(self._table, table, self._absent_ms, view.knowledge.prior.reshape(-1))
        self._sent.keep_after(dict(zip(table.replica_ids, table.reported_s.tolist(), strict=True)))
        self._table = table
        self._mixes = {
            name: self._mix_of(report) for name, report in zip(table.replica_ids, table.reports, strict=True)
        }
        self._absent_ms = np.zeros(table.miss_ms.shape, dtype=np.float32)
        for place in range(len(table)):
            self._expect(place)

    def rank(self, request: RoutingRequest) -> list[str]:
        """Replica ids of the workers that can take the request, best first.

        Raises:
            Unavailable: no worker is ready, or only such as the request avoids.
            Overloaded: all that are have as many requests as they take.
        """
        places = self._fitting(request)
        order = self._choose(request, places)
        return [self._table.replica_ids[place] for place in order.tolist()]

    def note_sent(self, replica_id: str, request: RoutingRequest, now_s: float) -> None:
        """The request was sent there."""
        self._prefixes.note(request.blocks, replica_id)
        place = self._table.index.get(replica_id)
        if place is not None:
            uses = self._uses(request)
            if uses is not None:
                self._mixes[replica_id].note(uses, float(self._open()[place]))
            self._sent.add(place, replica_id, SentRequest(now_s, 1, request.num_tokens, uses))
            self._expect(place)

    def note_finished(self, replica_id: str, now_s: float) -> None:
        """A request that was sent there is over, however it ended."""
        place = self._table.index.get(replica_id)
        if place is not None:
            self._sent.add(place, replica_id, SentRequest(now_s, -1, 0, None))

    def num_open(self) -> dict[str, float]:
        """Requests that each worker has, as far as is known."""
        return dict(zip(self._table.replica_ids, self._open().tolist(), strict=True))

    def _mix_of(self, report: WorkerReport) -> RequestMix:
        """What a worker's requests use: as it reports, with what was sent since; else as this router remembers."""
        if not report.mix:
            return self._mixes.get(report.replica_id, RequestMix())
        mix, num_open = RequestMix.from_bytes(report.mix), report.num_running + report.num_waiting
        for event in self._sent.of(report.replica_id):
            if event.uses is not None:
                mix.note(event.uses, num_open)
            num_open += event.num_requests
        return mix

    def _expect(self, place: int) -> None:
        name, table = self._table.replica_ids[place], self._table
        kept = self._calibration.kept(name, float(table.resident[place].sum()), self.settings.expected_tokens)
        self._absent_ms[place] = expected_absence(table, place, self._mixes[name], kept)

    def _fitting(self, request: RoutingRequest) -> np.ndarray:
        """Places of the workers that may take a request."""
        table = self._table
        allowed = table.is_ready & np.array([name not in request.avoid for name in table.replica_ids], dtype=np.bool_)
        if not allowed.any():
            raise Unavailable(
                f"of {len(table)} attention workers {int(table.is_ready.sum())} are ready, and the request avoids "
                f"{len(request.avoid)}; try again later"
            )
        fits = allowed & (self._open() < table.max_open)
        if not fits.any():
            raise Overloaded(f"all {int(allowed.sum())} attention workers have as many requests as they take")
        well = fits & table.is_well
        return np.flatnonzero(well if well.any() else fits)

    def _open(self) -> np.ndarray:
        """[W] requests running or waiting, with those sent since the report."""
        return self._table.num_running + self._table.num_waiting + self._sent.counts

    def _uses(self, request: RoutingRequest) -> np.ndarray | None:
        """[N] chance that a decoded token uses an expert."""
        if self._knowledge is None or not request.embedding:
            return None
        uses = expected_uses(self._knowledge, request.embedding).reshape(-1)
        return uses if len(uses) == self._absent_ms.shape[1] else None

    def _by_cost(self, request: RoutingRequest, places: np.ndarray) -> np.ndarray:
        if self._rng.random() < self.settings.exploration:
            return self._by_load(request, places)
        all_costs, usual_ms = self._costs(request)
        costs, open_ = all_costs[places], self._open()[places]
        if usual_ms <= 0 and not costs.any():  # nothing was measured yet
            return self._by_load(request, places)
        share = max(self.settings.imbalance * (open_.mean() + 1 / len(places)), open_.min() + 1)
        stands_back = open_ + 1 > share
        order = np.lexsort((costs, stands_back))
        equal = order[costs[order] <= costs[order[0]] + self.settings.band * usual_ms]
        equal = equal[stands_back[equal] == stands_back[order[0]]]
        if len(equal) > 1:
            first, second = self._rng.choice(equal, 2, replace=False).tolist()
            if open_[second] < open_[first]:
                first, second = second, first
            rest = [place for place in order.tolist() if place not in (first, second)]
            order = np.array([first, second, *rest])
        return places[order]

    def _costs(self, request: RoutingRequest) -> tuple[np.ndarray, float]:
        """[W] expected milliseconds, as far as they count, and what an answer takes on the fastest worker."""
        table, settings, sent = self._table, self.settings, self._sent
        num_tokens = min(request.max_tokens, settings.expected_tokens)
        worker_ms = request.num_tokens * table.prefill_ms
        worker_ms += num_tokens * np.array([self._calibration.compute_ms(name) for name in table.replica_ids])
        costs = np.zeros(len(table))
        uses = self._uses(request)
        if uses is not None:
            assert self._knowledge is not None
            usual = self._knowledge.prior.reshape(-1)
            load_ms = num_tokens * self._calibration.factor * (table.num_running + 1)
            worker_ms += load_ms * (self._absent_ms @ usual)
            costs += load_ms * (self._absent_ms @ (uses - usual))
        waiting = table.num_waiting + np.where(table.num_waiting > 0, sent.counts, 0.0)
        if not (waiting > 0).all():
            costs += np.where(worker_ms > settings.slower * worker_ms.min(), worker_ms - worker_ms.min(), 0.0)
            answer_ms = settings.expected_tokens * table.step_ms / np.maximum(table.num_running, 1.0)
            costs += np.where(waiting > 0, (waiting + 1) * answer_ms, 0.0)
            costs += (table.waiting_tokens + sent.tokens) * table.prefill_ms
        for replica_id, blocks in self._prefixes.num_cached(request.blocks).items():
            place = table.index.get(replica_id)
            if place is not None:
                costs[place] -= min(blocks * settings.block_size, request.num_tokens) * table.prefill_ms[place]
        return costs, float(worker_ms.min())

    def _at_random(self, request: RoutingRequest, places: np.ndarray) -> np.ndarray:
        return self._rng.permutation(places)

    def _by_load(self, request: RoutingRequest, places: np.ndarray) -> np.ndarray:
        shuffled = self._rng.permutation(places)
        return shuffled[np.argsort(self._open()[shuffled], kind="stable")]

    def _by_prefix(self, request: RoutingRequest, places: np.ndarray) -> np.ndarray:
        """The longest known prefix, unless it is short or its worker has more than its share (SGLang's, Ray's rule)."""
        order = self._by_load(request, places)
        cached = np.zeros(len(self._table))
        for replica_id, blocks in self._prefixes.num_cached(request.blocks).items():
            if replica_id in self._table.index:
                cached[self._table.index[replica_id]] = blocks
        open_ = self._open()
        cached[cached * self.settings.block_size < self.settings.matched_share * request.num_tokens] = 0
        cached[open_ + 1 > max(self.settings.imbalance * open_[places].mean(), open_[places].min() + 1)] = 0
        return order[np.argsort(-cached[order], kind="stable")]
