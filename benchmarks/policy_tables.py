"""The tables of benchmarks/policies.py: one line a policy."""

from __future__ import annotations

from collections.abc import Sequence

from policy_targets import CACHE_OF_PREFETCH
from rich.console import Console
from rich.table import Table

from cluster.replay.result import ReplayCell


def print_caching(cells: Sequence[ReplayCell]) -> None:
    """Hit rates of caching alone, by sequences and cache."""
    alone = {(c.policy, c.concurrency, c.cache): c.timely_hit_rate for c in cells if "+" not in c.policy}
    machines = sorted({(concurrency, cache) for _, concurrency, cache in alone})
    table = Table("policy", title="Caching alone: hit rate by number of sequences and cache")
    for concurrency, cache in machines:
        table.add_column(f"{concurrency} seq{'s' if concurrency > 1 else ''}\n{cache:.1%}", justify="right")
    for policy in dict.fromkeys(policy for policy, _, _ in alone):
        table.add_row(policy, *(f"{alone[policy, *machine]:.3f}" for machine in machines))
    Console(width=150).print(table)


def prefetch_rows(cells: Sequence[ReplayCell]) -> list[dict[str, str]]:
    """Of one sequence at the cache of prefetch: times, rates and bytes by link."""
    at = {(c.policy, c.link_gb_per_s): c for c in cells if (c.concurrency, c.cache) == (1, CACHE_OF_PREFETCH)}
    links = sorted({link for _, link in at})
    rows: list[dict[str, str]] = []
    for policy in dict.fromkeys(policy for policy, _ in at):
        row = {"policy": policy}
        row |= {f"ms\n{link:g}": f"{at[policy, link].tpot_ms_mean:.4g}" for link in links}
        row |= {f"timely\n{link:g}": f"{at[policy, link].timely_hit_rate:.3f}" for link in links}
        row |= {f"MB\n{link:g}": f"{at[policy, link].bytes_per_token / 1e6:.0f}" for link in links}
        rows.append(row)
    return rows
