"""Expert memory live: every policy over a declared link, and our engine against peers on one throttled disk.

Part `live`: our engine on the demo model widened 32 times, every eviction and prediction, over the emulated link from
RAM to DEVICE; the same cells in replay. Part `peers`: our engine, `transformers` with accelerate's disk offload and
llama.cpp with mmap on an 8x copy, equal memory and the same kernel block-I/O throttle.

    python -m benchmarks offload [--part live|peers|all] [--quick] [--json] [--plot offload.png] [--mb-per-s 100]
"""

from __future__ import annotations

import dataclasses
import warnings
from argparse import ArgumentParser, Namespace
from pathlib import Path
from typing import Any

from benchmarks.shared.measuring import one_thread
from benchmarks.shared.report import Report, Table


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--part", choices=("live", "peers", "all"), default="all")
    parser.add_argument("--caches", help="shares of the experts that fit, by comma: 12.5%%,25%%,50%%")
    parser.add_argument("--policies", help="part live: EVICTION+PREDICTION, by comma")
    parser.add_argument("--mb-per-s", type=float, help="part peers: the throttle of the disk")
    parser.add_argument("--plot", type=Path, help="write a PNG")


def run(options: Namespace) -> Report:
    """Measure."""
    reports: dict[str, Report] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if options.part != "peers":
            reports["live"] = _live(options)
        if options.part != "live":
            reports["peers"] = _peers(options)
    if options.plot:
        from benchmarks.offload.plot import plot

        plot(options.plot, reports)
    return _joined(reports)


def _condensed(row: dict[str, Any]) -> dict[str, Any]:
    """A row for a table: what belongs together in one column."""
    groups = {
        "cache / GB/s / at a time": ("cache", "GB/s", "at a time"),
        "TPOT ms mean / p50 / p99": ("TPOT mean ms", "p50 ms", "p99 ms"),
        "hit / timely": ("hit", "timely"),
        "MB per token from disk / link": ("MB read/token", "MB link/token"),
        "prefetch used / late / wasted": ("used", "late", "wasted"),
        "search share / ms a gate": ("search share", "search ms/gate"),
        "replay: hit / live over its TPOT": ("replay hit", "live/replay TPOT"),
    }
    first = {names[0]: (title, names) for title, names in groups.items()}
    rest = {name for names in groups.values() for name in names[1:]}
    condensed: dict[str, Any] = {}
    for name, value in row.items():
        if name in first:
            title, names = first[name]
            condensed[title] = "/".join(_short(row[each]) for each in names if each in row)
        elif name not in rest:
            condensed[name] = value
    return condensed


def _short(value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    return f"{value:.2g}" if value < 0.1 else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _live(options: Any) -> Report:
    from benchmarks.offload.live import FACTOR, FULL, QUICK, Live

    plan = QUICK if options.quick else FULL
    plan = dataclasses.replace(plan, caches=_shares(options.caches) or plan.caches)
    if options.policies:
        plan = dataclasses.replace(plan, policies=tuple(options.policies.split(",")))
    report = Report(f"Policies live: moesaic-demo-{FACTOR}x, {plan.prompts} prompts, {plan.num_tokens} tokens each")
    with one_thread():
        Live(report, plan).run()
    return report


def _peers(options: Any) -> Report:
    from benchmarks.offload.peers import FACTOR, FULL, QUICK, Peers

    plan = QUICK if options.quick else FULL
    plan = dataclasses.replace(
        plan, caches=_shares(options.caches) or plan.caches, mb_per_s=options.mb_per_s or plan.mb_per_s
    )
    report = Report(
        f"Short of memory: moesaic-demo-{FACTOR}x, {plan.rounds} rounds of {plan.prompts} prompts, {plan.num_tokens} "
        f"tokens each (peers {plan.peer_tokens} in all, a round)"
    )
    Peers(report, plan).run()
    return report


def _shares(text: str | None) -> tuple[float, ...]:
    return tuple(float(share.strip().rstrip("%")) / 100 for share in text.split(",")) if text else ()


def _joined(reports: dict[str, Report]) -> Report:
    """One report of all parts: every number for machines, a table for each part for people."""
    joined = Report("; ".join(report.title for report in reports.values()))
    for part, report in reports.items():
        joined.rows += [{"part": part, **row} for row in report.rows]
        joined.tables.append(Table(report.title, [_condensed(row) for row in report.rows]))
        joined.targets += report.targets
        joined.notes += report.notes
    joined.load_before = next(iter(reports.values())).load_before
    return joined
