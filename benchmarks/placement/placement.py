"""Placement on recorded routing: planned on one period, scored on the next.

Loads are the demo model's gate traces (two halves of the prompts of every domain) and published counts of OLMoE and
Mixtral. Baselines: contiguous blocks, random, DeepSeek's EPLB as published, and an oracle that knows the second
period. What is ours is the scheduler's own planner, from contiguous blocks, with every move priced.

    python -m benchmarks placement [--quick] [--json] [--plot FILE] [--past T --trace T]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.placement.batches import batch_rows, replica_choice_time
from benchmarks.placement.controls import add_controls, unequal_hosts
from benchmarks.placement.methods import (
    contiguous,
    eplb,
    oracle,
    ours,
    random_score,
    score,
    transfers,
)
from benchmarks.placement.sources import Periods, demo_periods, published_periods
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import median
from benchmarks.shared.report import Report
from benchmarks.shared.traces import both_traces
from cluster.policies.trace import load_trace

HOSTS = (4, 8)
SPARES = (0.0, 0.125, 0.25)
_LEAST_GAP = 0.03  # between contiguous and oracle; below, the planner itself leaves hosts alone


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--past", type=Path, help="trace to plan by; default: recorded once, of the first half")
    parser.add_argument("--trace", type=Path, help="trace to score on; default: recorded once, of the second half")
    parser.add_argument("--plot", type=Path, help="PNG or SVG to draw")


def run(options: Namespace) -> Report:
    """Measure."""
    past, held_out = (load_trace(path) for path in both_traces(options.past, options.trace))
    report = Report(
        "Largest over mean host load in the second period; room: for replicas; moved: experts; saves: in 10 minutes"
    )
    sources = [(periods.source, [periods]) for periods in demo_periods(past, held_out)] + published_periods()
    for source, all_periods in sources:
        for num_hosts in HOSTS[:1] if options.quick and "other texts" in source else HOSTS:
            for spare in SPARES:
                progress(f"{source}, {num_hosts} hosts, {spare:.0%} more room")
                report.rows.append(compared(source, all_periods, num_hosts, spare))
    _targets(report)
    add_controls(report, quick=options.quick)
    unequal_hosts(report, demo_periods(past, held_out)[0])
    batch_rows(report, past, held_out, num_batches=50 if options.quick else 400)
    replica_choice_time(report)
    if options.plot:
        from benchmarks.placement.plot import draw

        draw(report.rows, options.plot)
    if len(sources) == 2:
        report.notes.append("the published counts of OLMoE and Mixtral are not on this machine: left out")
    return report


def compared(source: str, all_periods: list[Periods], num_hosts: int, spare: float) -> dict[str, Any]:
    """One row: medians over the ways to make periods of the source."""
    found: dict[str, list[float]] = {}

    def note(**values: float) -> None:
        for name, value in values.items():
            found.setdefault(name, []).append(value)

    for periods in all_periods:
        first, second = periods.first, periods.second
        blocks = contiguous(*first.shape, num_hosts)
        planned, plan = ours(first, periods.top_k, num_hosts, spare)
        literal = eplb(first, num_hosts, spare)
        worst, mine, best = score(blocks, second), score(planned, second), oracle(periods, num_hosts, spare)
        note(
            contiguous=worst,
            random=random_score(second, num_hosts),
            EPLB=score(literal, second),
            ours=mine,
            oracle=best,
            moved=transfers(blocks, planned),
            moved_EPLB=transfers(blocks, literal),
            saves_s=plan.gain_s,
        )
    row: dict[str, Any] = {"loads": source, "hosts": num_hosts, "room": f"{spare:.1%}"}
    row |= {name: median(values) for name, values in found.items()}
    row["gap closed"] = gap_closed(row["contiguous"], row["ours"], row["oracle"])
    row["by EPLB"] = gap_closed(row["contiguous"], row["EPLB"], row["oracle"])
    return row


def gap_closed(worst: float, mine: float, best: float) -> float | None:
    """The share of the way from contiguous to oracle; None where there is none to go."""
    return (worst - mine) / (worst - best) if worst - best > _LEAST_GAP else None


def _targets(report: Report) -> None:
    sources = dict.fromkeys(str(row["loads"]) for row in report.rows)
    for source in sources:
        rows = [row for row in report.rows if row["loads"] == source]
        closed = [row["gap closed"] for row in rows if row["gap closed"] is not None]
        if "other texts" in source:
            harm = max(row["ours"] / row["contiguous"] - 1.0 for row in rows)
            report.at_most(f"{source}: busier than contiguous, worst case", harm, 0.05)
        elif closed:
            report.at_least(f"{source}: gap to oracle closed, worst of hosts and room", min(closed), 0.70)
