"""Cache and prefetch policies in replay: gate traces of held-out prompts, virtual time over a declared link.

Stores and predictors learn from the first half of the prompts of every domain (the past) and never see the second
half, which is replayed. Experts have the size of the demo model's widened 32 times. Nothing is tuned on what is
printed: settings were chosen on a split of the first half.

    python benchmarks/policies.py [--quick] [--json] [--policies moesaic,...] [--past T --trace T]
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from harness import SHARED_PROMPTS, Report, arguments, progress

from actors.experts.trace import GateTrace, load_trace
from cluster.replay.result import BOUND_CACHE, BOUND_PREFETCH, ReplayCell, with_bounds
from cluster.replay.sweep import Sweep, learn_past, replay_cells

CACHING = ("lru", "lfu", "static", "mrs", "eam", "fmoe")
PREFETCHING = ("lru+whole-layer", "lru+next-gate", "mrs+next-gate", "eam+eam", "fmoe+fmoe")
PUBLISHED_BASELINES = ("lru+whole-layer", "lru+next-gate", "eam+eam", "lru")
OURS = "moesaic"
EXPERT_BYTES = 32 * 102_400
CACHES = (0.125, 0.25, 0.5)
LINKS = (0.2, 1.0, 4.0, 16.0, 64.0)
PROMPTS_PER_DOMAIN = 24
CACHE_OF_PREFETCH = 0.25


def main() -> int:
    parser = arguments(__doc__ or "")
    parser.add_argument("--past", type=Path, help="trace to learn from; default: recorded once, of the first half")
    parser.add_argument("--trace", type=Path, help="trace to replay; default: recorded once, of the second half")
    parser.add_argument("--ours", default=OURS, help="our policies, by comma, or none")
    options = parser.parse_args()
    ours = [] if options.ours == "none" else options.ours.split(",")
    past, held_out = (load_trace(path) for path in _traces(options.past, options.trace))
    if options.quick:
        held_out = _first_of_each_domain(held_out, 1)
    links = (1.0, 16.0) if options.quick else LINKS
    report = Report(f"Policies in replay: {len(held_out.requests)} held-out requests, 32x experts, 1 sequence")
    alone = Sweep(policies=(*CACHING, *ours, BOUND_CACHE), caches=CACHES, links=(1.0,), expert_bytes=EXPERT_BYTES)
    ahead = Sweep(
        policies=(*CACHING, *PREFETCHING, *(f"{name}+{name}" for name in ours), BOUND_CACHE, BOUND_PREFETCH),
        caches=(CACHE_OF_PREFETCH,),
        links=links,
        expert_bytes=EXPERT_BYTES,
    )
    cells: list[ReplayCell] = []
    for name, sweep in (("caching alone", alone), ("with prefetch", ahead)):
        found = with_bounds(_run(past, held_out, sweep))
        cells += found
        report.rows += [{"part": name, **_row(cell)} for cell in found]
    for name in ours:
        _caching_targets(report, cells[: alone.num_cells], name)
        _prefetch_targets(report, cells[alone.num_cells :], f"{name}+{name}")
    report.notes.append(
        "compute 0.1 ms a layer and 0.1 ms an expert (virtual time); link rate as declared; stores learned from "
        f"{len(past.requests)} other prompts; rates are of decode steps, in distinct experts"
    )
    return report.finish(as_json=options.json)


def _run(past: GateTrace, held_out: GateTrace, sweep: Sweep) -> list[ReplayCell]:
    learned = learn_past(past, sweep)
    cells: list[ReplayCell] = []
    for cell in replay_cells(held_out, learned, sweep):
        cells.append(cell)
        progress(f"{len(cells)} of {sweep.num_cells}: {cell.policy}, {cell.cache:.1%}, {cell.link_gb_per_s:g} GB/s")
    return cells


def _row(cell: ReplayCell) -> dict[str, object]:
    return {
        "policy": cell.policy,
        "cache": f"{cell.cache:.1%}",
        "GB/s": f"{cell.link_gb_per_s:g}",
        "hit": cell.hit_rate,
        "timely": cell.timely_hit_rate,
        "loads/token": cell.loads_per_token,
        "MB/token": cell.bytes_per_token / 1e6,
        "wasted": cell.prefetch_wasted,
        "stall ms": cell.stall_ms_per_token,
        "TPOT ms": cell.tpot_ms_mean,
        "p99 ms": cell.tpot_ms_p99,
    }


def _caching_targets(report: Report, cells: Sequence[ReplayCell], ours: str) -> None:
    for cache in CACHES:
        rates = {c.policy: c.timely_hit_rate for c in cells if c.cache == cache}
        best = max(rates[name] for name in CACHING)
        report.at_least(f"{ours} alone, {cache:.1%}: hit rate over the best of the others", rates[ours] - best, 0.0)
        if cache == CACHE_OF_PREFETCH:
            closed = (rates[ours] - best) / max(rates[BOUND_CACHE] - best, 1e-9)
            report.at_least(f"{ours} alone, {cache:.1%}: share of the gap to Belady closed", closed, 0.2)


def _prefetch_targets(report: Report, cells: Sequence[ReplayCell], ours: str) -> None:
    gains: list[float] = []
    for link in sorted({c.link_gb_per_s for c in cells}):
        at = {c.policy: c for c in cells if c.link_gb_per_s == link}
        others = [at[name] for name in (*CACHING, *PREFETCHING)]
        best = min(others, key=lambda c: c.tpot_ms_mean)
        own, oracle = at[ours], at[BOUND_PREFETCH]
        label = f"{ours}, {link:g} GB/s"
        report.at_most(
            f"{label}: mean TPOT over the best other ({best.policy})", own.tpot_ms_mean / best.tpot_ms_mean, 1.02
        )
        demand = min((at[name] for name in CACHING), key=lambda c: c.loads_per_token)
        load_ms = 1e3 * demand.bytes_per_token / (link * 1e9)
        has_room = load_ms < demand.tpot_ms_mean - demand.stall_ms_per_token
        reduction = (best.tpot_ms_mean - own.tpot_ms_mean) / max(best.tpot_ms_mean - oracle.tpot_ms_mean, 1e-9)
        report.at_least(f"{label}: share of the oracle's TPOT reduction", reduction, 0.5 if has_room else 0.2)
        if has_room:
            missed = (1 - own.timely_hit_rate) / max(1 - at["eam+eam"].timely_hit_rate, 1e-9)
            report.at_most(f"{label}: timely misses over eam's", missed, 0.6)
        else:
            report.at_most(
                f"{label}: bytes over the best demand policy", own.bytes_per_token / demand.bytes_per_token, 1.05
            )
        gains += [1 - own.tpot_ms_mean / at[name].tpot_ms_mean for name in PUBLISHED_BASELINES]
    report.notes.append(
        f"{ours}: mean TPOT reduction over {', '.join(PUBLISHED_BASELINES)} and all links: "
        f"{sum(gains) / len(gains):.1%} (fMoE's paper: 47%, other models, machines and baselines)"
    )


def _first_of_each_domain(trace: GateTrace, count: int) -> GateTrace:
    seen: dict[str, int] = {}
    chosen: list[int] = []
    for index, request in enumerate(trace.requests):
        seen[request.domain] = seen.get(request.domain, 0) + 1
        if seen[request.domain] <= count:
            chosen.append(index)
    return trace.select(chosen)


def _traces(past: Path | None, held_out: Path | None) -> tuple[Path, Path]:
    """The two traces: given, or recorded once from the shared prompts with the demo model."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moesaic"
    cache.mkdir(parents=True, exist_ok=True)
    half = PROMPTS_PER_DOMAIN // 2
    return (
        past or _recorded(cache / "policies-past.npz", slice(0, half), seed=0),
        held_out or _recorded(cache / "policies-held-out.npz", slice(half, 2 * half), seed=1000),
    )


def _recorded(path: Path, part: slice, *, seed: int) -> Path:
    if path.is_file():
        return path
    from cluster.cli.trace import record

    progress(f"recording {path}")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as prompts:
        prompts.writelines(json.dumps(entry) + "\n" for entry in _prompts(part))
        prompts.flush()
        record(prompts=Path(prompts.name), out=path, threads=1, seed=seed)
    return path


def _prompts(part: slice) -> list[dict[str, str]]:
    """Prompts of every domain: the shared ones when they are there, else the bundled ones, halved."""
    if SHARED_PROMPTS.is_dir():
        files = sorted(SHARED_PROMPTS.glob("*.jsonl"))
        return [json.loads(line) for file in files for line in file.read_text().splitlines()[part]]
    from cluster.loadgen.prompts import BUNDLED_PROMPTS

    return [{"prompt": text, "domain": "bundled"} for text in BUNDLED_PROMPTS[part.start != 0 :: 2]]


if __name__ == "__main__":
    raise SystemExit(main())
