"""Requests for benchmark `routing`: gate traces of held-out prompts of many domains, embedded as a front end would.

The same two traces as in benchmark `policies`: an earlier day (to learn from, to warm up, and for the oracle) and the
requests that are reported.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from benchmarks.shared.models import DEMO
from benchmarks.shared.traces import both_traces, first_of_each_domain
from cluster.frontend.generation.prompt_embedder import PromptEmbedder
from cluster.policies.next_use.estimate import NextUse
from cluster.policies.signals import Grid
from cluster.policies.trace import GateTrace, load_trace
from cluster.replay.fleet.worker import FleetRequest
from cluster.replay.schedule import grid_of, part_of
from cluster.replay.sweep import Sweep, learn_past

_TABLE_TIMEOUT_S = 60.0
_LEARNED_FROM = 2  # requests of each domain that workers' policies have learned from before they start


@dataclass(frozen=True, slots=True, kw_only=True)
class Workload:
    """past: requests of an earlier time. measured: those that are reported. learned: what workers' policies start from.

    dim: of the model. All requests are templates: `fresh` makes one that can run.
    """

    grid: Grid
    dim: int
    past: tuple[FleetRequest, ...]
    measured: tuple[FleetRequest, ...]
    learned: NextUse


def load_workload(
    past: Path | None, held_out: Path | None, *, per_domain: int | None, is_null: bool = False
) -> Workload:
    """Args: per_domain: requests of each domain at most. is_null: gates deal their choices anew, to any token."""
    traces = [load_trace(path) for path in both_traces(past, held_out)]
    if per_domain is not None:
        traces = [first_of_each_domain(trace, per_domain) for trace in traces]
    if is_null:
        traces = [trace.shuffled(seed) for seed, trace in enumerate(traces)]
    embedder = PromptEmbedder(DEMO, vocab_size=0)
    if not embedder.wait(_TABLE_TIMEOUT_S):
        raise SystemExit(f"{DEMO}: its token embeddings cannot be read")
    earlier = first_of_each_domain(traces[0], _LEARNED_FROM)
    learned = learn_past(earlier, Sweep(policies=("moesaic",), caches=(), links=())).next_use
    assert learned is not None, "asked for"
    return Workload(
        grid=grid_of(traces[0]),
        dim=traces[0].embeddings.shape[1],
        past=tuple(_requests(traces[0], embedder)),
        measured=tuple(_requests(traces[1], embedder)),
        learned=learned,
    )


def fresh(template: FleetRequest, number: int, embedding: bytes | None = None) -> FleetRequest:
    """A request that has not run yet."""
    return FleetRequest(
        number,
        template.domain,
        template.parts,
        template.embedding if embedding is None else embedding,
        template.prompt_ids,
        template.used,
    )


def _requests(trace: GateTrace, embedder: PromptEmbedder) -> list[FleetRequest]:
    grid = grid_of(trace)
    requests: list[FleetRequest] = []
    for number, traced in enumerate(trace.requests):
        rows = trace.rows_of(number)
        parts = tuple(part_of(rows, part, grid) for part in rows.step_slices())
        used = np.sum([part.counts for part in parts if part.is_decode], axis=0)
        requests.append(
            FleetRequest(number, traced.domain, parts, embedder.embed(traced.prompt_ids), traced.prompt_ids, used)
        )
    return requests
