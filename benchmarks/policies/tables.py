"""The tables of benchmark `policies`: one line a policy."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from benchmarks.policies.targets import CACHE_OF_PREFETCH
from benchmarks.shared.report import Table
from cluster.replay.result import ReplayCell


def caching_table(cells: Sequence[ReplayCell]) -> Table:
    """Hit rates of caching alone, by sequences and cache."""
    alone = {(c.policy, c.concurrency, c.cache): c.timely_hit_rate for c in cells if "+" not in c.policy}
    machines = sorted({(concurrency, cache) for _, concurrency, cache in alone})
    rows = [
        {"policy": policy}
        | {
            f"{number} seq{'s' if number > 1 else ''}, {cache:.1%}": f"{alone[policy, number, cache]:.3f}"
            for number, cache in machines
        }
        for policy in dict.fromkeys(policy for policy, _, _ in alone)
    ]
    return Table("Caching alone: hit rate by number of sequences and cache", rows)


def prefetch_tables(cells: Sequence[ReplayCell]) -> list[Table]:
    """Of one sequence at the cache of prefetch: times, rates and bytes, each by link."""
    at = {(c.policy, c.link_gb_per_s): c for c in cells if (c.concurrency, c.cache) == (1, CACHE_OF_PREFETCH)}
    links = sorted({link for _, link in at})
    figures: dict[str, Callable[[ReplayCell], str]] = {
        "mean TPOT in ms": lambda cell: f"{cell.tpot_ms_mean:.4g}",
        "timely hit rate": lambda cell: f"{cell.timely_hit_rate:.3f}",
        "MB loaded for a token": lambda cell: f"{cell.bytes_per_token / 1e6:.0f}",
    }
    return [
        Table(
            f"With prefetch, cache {CACHE_OF_PREFETCH:.0%}, 1 sequence: {name}, by the link's GB/s",
            [
                {"policy": policy} | {f"{link:g} GB/s": shown(at[policy, link]) for link in links}
                for policy in dict.fromkeys(policy for policy, _ in at)
            ],
        )
        for name, shown in figures.items()
    ]
