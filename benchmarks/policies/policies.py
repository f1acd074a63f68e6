"""Cache and prefetch policies in replay: gate traces of held-out prompts, virtual time over a declared link.

Stores and predictors learn from the first half of the prompts of every domain (the past) and never see the second
half, which is replayed. Experts have the size of the demo model's widened 32 times. Nothing is tuned on what is
printed: settings were chosen on a split of the first half.

    python -m benchmarks policies [--quick] [--json] [--plot FILE] [--past T --trace T] [--baselines FILE]
"""

from __future__ import annotations

import json
import time
from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from benchmarks.policies.tables import caching_table, prefetch_tables
from benchmarks.policies.targets import (
    CACHE_OF_PREFETCH,
    CACHING,
    PREFETCHING,
    caching_targets,
    null_targets,
    prefetch_targets,
)
from benchmarks.shared.command_line import progress
from benchmarks.shared.report import Report
from benchmarks.shared.traces import both_traces, first_of_each_domain
from cluster.policies.build import PolicySettings
from cluster.policies.expert_maps.search import MapSearch
from cluster.policies.trace import GateTrace, load_trace
from cluster.replay.plot import draw
from cluster.replay.result import BOUND_CACHE, BOUND_PREFETCH, ReplayCell, with_bounds
from cluster.replay.schedule import build_steps, grid_of
from cluster.replay.sweep import Past, Sweep, learn_past, replay_cells, show

OURS = "moesaic"
EXPERT_BYTES = 32 * 102_400
CACHES = (0.125, 0.25, 0.5)
LINKS = (0.2, 1.0, 4.0, 16.0, 64.0)
CONCURRENCIES = (8, 16)  # besides 1
NULL_LINKS = (1.0, 16.0)
FULL_REQUESTS, QUICK_REQUESTS, QUICK_PAST, NULL_REQUESTS, NULL_PAST = 4, 1, 4, 1, 3  # of each domain
NULL_CACHING = ("lru", "lfu", "static", "mrs")
NULL_PREFETCHING = ("mrs+next-gate",)
EVERYTHING = ("lru", "lru+whole-layer", "eam+eam", "fmoe+fmoe")
_SEARCHED_STEPS = 300


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--past", type=Path, help="trace to learn from; default: recorded once, of the first half")
    parser.add_argument("--trace", type=Path, help="trace to replay; default: recorded once, of the second half")
    parser.add_argument("--ours", default=OURS, help="our policies, by comma, or none")
    parser.add_argument("--requests", type=int, help=f"of each domain; default {FULL_REQUESTS}, quick {QUICK_REQUESTS}")
    parser.add_argument("--baselines", type=Path, help="others' rows: from here if it exists, else written here")
    parser.add_argument("--plot", type=Path, help="PNG or SVG to draw")


def run(options: Namespace) -> Report:
    """Measure."""
    ours = [] if options.ours == "none" else options.ours.split(",")
    past, held_out = (load_trace(path) for path in both_traces(options.past, options.trace))
    held_out = first_of_each_domain(held_out, options.requests or (QUICK_REQUESTS if options.quick else FULL_REQUESTS))
    if options.quick:
        past = first_of_each_domain(past, QUICK_PAST)
    progress(f"learning from {len(past.requests)} requests")
    learned = learn_past(past, Sweep(policies=(*CACHING, *ours), caches=(), links=()))
    cells = _others(held_out, learned, options.baselines)
    cells = with_bounds([*cells, *_replayed(held_out, learned, _sweeps(ours, [f"{name}+{name}" for name in ours]))])
    report = Report("Cache and prefetch policies in replay")
    for name in ours:
        caching_targets(report, cells, name)
        prefetch_targets(report, cells, name)
    few = first_of_each_domain(held_out, NULL_REQUESTS)
    _everything_fits(report, few, learned, ours)
    _null_cases(report, past, few, ours)
    if options.plot:
        draw(cells, options.plot)
    report.notes += [
        _search_share(past),
        f"{len(held_out.requests)} held-out requests, stores learned from {len(past.requests)} others; 32x experts; "
        "compute 0.1 ms a layer and 0.1 ms an expert (virtual time); rates are of decode steps, in distinct experts",
    ]
    report.rows = [cell.as_row() for cell in cells]
    report.tables = [caching_table(cells), *prefetch_tables(cells)]
    return report


def _sweeps(caching: Sequence[str], ahead: Sequence[str]) -> list[Sweep]:
    """Caching alone at all caches and numbers of sequences; with one sequence all links, and prefetch at one cache."""
    if not caching:
        return []
    one = Sweep(policies=caching, caches=CACHES, links=LINKS, expert_bytes=EXPERT_BYTES)
    return [
        one,
        replace(one, links=LINKS[2:3], concurrencies=CONCURRENCIES),
        replace(one, policies=ahead, caches=(CACHE_OF_PREFETCH,)),
    ]


def _others(held_out: GateTrace, learned: Past, kept: Path | None) -> list[ReplayCell]:
    """Rows of all policies but ours; kept in a file they are replayed once."""
    key = [request.request_id for request in held_out.requests]
    if kept is not None and kept.is_file():
        found = json.loads(kept.read_text())
        if found["requests"] == key:
            return [ReplayCell(**cell) for cell in found["cells"]]
        progress(f"{kept}: of other requests, replayed anew")
    cells = _replayed(held_out, learned, _sweeps((*CACHING, BOUND_CACHE), (*PREFETCHING, BOUND_PREFETCH)))
    if kept is not None:
        kept.write_text(json.dumps({"requests": key, "cells": [cell.as_row() for cell in cells]}))
    return cells


def _replayed(trace: GateTrace, learned: Past, sweeps: Sequence[Sweep]) -> list[ReplayCell]:
    began_s, cells = time.monotonic(), list[ReplayCell]()
    for sweep in sweeps:
        for cell in replay_cells(trace, learned, sweep):
            if not cells or (cell.policy, cell.concurrency) != (cells[-1].policy, cells[-1].concurrency):
                progress(f"{time.monotonic() - began_s:5.0f} s: {cell.policy}, {cell.concurrency} sequences")
            cells.append(cell)
    return cells


def _everything_fits(report: Report, held_out: GateTrace, learned: Past, ours: Sequence[str]) -> None:
    """With room for all experts none is loaded twice."""
    sweep = Sweep(
        policies=(*EVERYTHING, *(f"{name}+{name}" for name in ours)),
        caches=(1.0,),
        links=NULL_LINKS[-1:],
        expert_bytes=EXPERT_BYTES,
    )
    for cell in _replayed(held_out, learned, [sweep]):
        again = max(0, cell.num_loads - grid_of(held_out).size)
        report.at_most(f"{cell.policy}, cache 100%: loads after warm-up", again, 0)


def _null_cases(report: Report, past: GateTrace, held_out: GateTrace, ours: Sequence[str]) -> None:
    """Where nothing depends on anything there is nothing to gain and must be nothing to lose."""
    if not ours:
        return
    sweep = Sweep(
        policies=(*NULL_CACHING, *ours, *NULL_PREFETCHING, *(f"{name}+{name}" for name in ours)),
        caches=(CACHE_OF_PREFETCH,),
        links=NULL_LINKS,
        expert_bytes=EXPERT_BYTES,
    )
    few = first_of_each_domain(past, NULL_PAST)
    for label, earlier in (("shuffled", few.shuffled(seed=0)), ("shuffled, learned unshuffled", few)):
        found = _replayed(held_out.shuffled(seed=1), learn_past(earlier, sweep), [sweep])
        for name in ours:
            null_targets(report, found, name, label, NULL_CACHING, NULL_PREFETCHING)


def _search_share(past: GateTrace) -> str:
    """What fMoE's search costs on this machine, beside the compute of a step."""
    grid, settings = grid_of(past), PolicySettings()
    store = settings.new_map_store(grid, past.embeddings.shape[1])
    some = first_of_each_domain(past, 3)
    steps = build_steps(some, concurrency=1, order=range(len(some.requests)))
    for step in steps:  # first full: an entry replaced is dearer than one added
        store.insert(step.signal.embeddings, np.stack([gate.probs for gate in step.gates], axis=1))
    search, sweep = MapSearch(store), Sweep(policies=(), caches=(), links=())
    decode = [step for step in steps if step.is_decode][:_SEARCHED_STEPS]
    began_s = time.process_time()
    for step in decode:
        show(step, (search,))
    step_s = (time.process_time() - began_s) / len(decode)
    compute_s = grid.num_layers * (sweep.processor.base_s + grid.top_k * sweep.processor.expert_s)
    return (
        f"fMoE's search over {store.size} maps, insertion included: {1e6 * step_s / grid.num_layers:.0f} us a layer of "
        f"processor time here, {step_s / compute_s:.1%} of a step's compute, off the token path"
    )
