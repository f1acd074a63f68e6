"""The numbers promised for our policies in replay, beside those of all others."""

from __future__ import annotations

from collections.abc import Sequence

from benchmarks.shared.report import Report
from cluster.replay.result import BOUND_CACHE, BOUND_PREFETCH, ReplayCell

CACHING = ("lru", "lru-per-layer", "lfu", "static", "mrs", "eam", "fmoe")
PREFETCHING = ("lru+whole-layer", "lru-per-layer+next-gate", "mrs+next-gate", "eam+eam", "fmoe+fmoe")
# fetch the whole layer, mixtral-offloading, MoE-Infinity, on demand: what fMoE's mean is taken over, ProMoE aside
PUBLISHED_BASELINES = ("lru+whole-layer", "lru-per-layer+next-gate", "eam+eam", "lru")
CACHE_OF_PREFETCH = 0.25
_ALLOWED = 0.02


def caching_targets(report: Report, cells: Sequence[ReplayCell], ours: str) -> None:
    """Caching alone: never below the best of the others, and nearer to Belady."""
    for concurrency in sorted({c.concurrency for c in cells if c.policy == ours}):
        for cache in sorted({c.cache for c in cells if c.policy == ours}):
            rates = {c.policy: c.timely_hit_rate for c in cells if (c.cache, c.concurrency) == (cache, concurrency)}
            rival = max(CACHING, key=lambda name: rates[name])
            label = f"{ours} alone, {cache:.1%}, {concurrency} seqs"
            report.at_least(f"{label}: hit rate over the best other ({rival})", rates[ours] - rates[rival], 0.0)
            if cache == CACHE_OF_PREFETCH and concurrency == 1:
                closed = (rates[ours] - rates[rival]) / max(rates[BOUND_CACHE] - rates[rival], 1e-9)
                report.at_least(f"{label}: share of the gap to Belady closed", closed, 0.2)


def prefetch_targets(report: Report, cells: Sequence[ReplayCell], ours: str) -> None:
    """With prefetch, link by link: never slower than any other, and a share of what the oracle gains."""
    ahead = f"{ours}+{ours}"
    machine = [c for c in cells if (c.cache, c.concurrency) == (CACHE_OF_PREFETCH, 1)]
    gains: list[float] = []
    for link in sorted({c.link_gb_per_s for c in machine}):
        at = {c.policy: c for c in machine if c.link_gb_per_s == link}
        best = min((at[name] for name in (*CACHING, *PREFETCHING)), key=lambda c: c.tpot_ms_mean)
        own, oracle, label = at[ahead], at[BOUND_PREFETCH], f"{ahead}, {link:g} GB/s"
        slower = own.tpot_ms_mean / best.tpot_ms_mean
        report.at_most(f"{label}: mean TPOT over the best other ({best.policy})", slower, 1 + _ALLOWED)
        demand = min((at[name] for name in CACHING), key=lambda c: c.loads_per_token)
        reduction = (best.tpot_ms_mean - own.tpot_ms_mean) / max(best.tpot_ms_mean - oracle.tpot_ms_mean, 1e-9)
        if has_room(demand):
            report.at_least(f"{label}, has room: share of the oracle's TPOT reduction", reduction, 0.5)
            missed = (1 - own.timely_hit_rate) / max(1 - at["eam+eam"].timely_hit_rate, 1e-9)
            report.at_most(f"{label}, has room: timely misses over eam's", missed, 0.6)
        else:
            report.at_least(f"{label}: share of the oracle's TPOT reduction", reduction, 0.2)
            more = own.bytes_per_token / demand.bytes_per_token
            report.at_most(f"{label}: bytes over the best demand policy ({demand.policy})", more, 1.05)
        reductions = [1 - own.tpot_ms_mean / at[name].tpot_ms_mean for name in PUBLISHED_BASELINES]
        gains += reductions
        shown = ", ".join(f"{name} {gain:.1%}" for name, gain in zip(PUBLISHED_BASELINES, reductions, strict=True))
        report.notes.append(f"{label}: mean TPOT below {shown}")
    report.notes.append(
        f"{ahead}: mean TPOT reduction over these baselines and all links: {sum(gains) / len(gains):.1%} (fMoE's paper "
        "says 47%, of other models, machines and baselines)"
    )


def has_room(demand: ReplayCell) -> bool:
    """Whether loading the misses takes less time than computing. Args: demand: the best policy without prefetch."""
    load_ms = demand.bytes_per_token / (demand.link_gb_per_s * 1e6)
    return load_ms < demand.tpot_ms_mean - demand.stall_ms_per_token


def null_targets(
    report: Report,
    cells: Sequence[ReplayCell],
    ours: str,
    label: str,
    caching: Sequence[str],
    prefetching: Sequence[str],
) -> None:
    """Where nothing can be known: neither gain nor loss."""
    rates = {c.policy: c.timely_hit_rate for c in cells}
    better = rates[ours] / max(rates[name] for name in caching) - 1
    report.at_most(f"{label}: hit rate of {ours} {_side(better)} the best, relative", abs(better), _ALLOWED)
    for link in sorted({c.link_gb_per_s for c in cells}):
        times = {c.policy: c.tpot_ms_mean for c in cells if c.link_gb_per_s == link}
        slower = times[f"{ours}+{ours}"] / min(times[name] for name in (*caching, *prefetching)) - 1
        name = f"{label}, {link:g} GB/s: mean TPOT of {ours}+{ours} {_side(slower)} the best, relative"
        report.at_most(name, abs(slower), _ALLOWED)


def _side(difference: float) -> str:
    return "above" if difference > 0 else "below"
