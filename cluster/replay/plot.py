"""Draws a sweep: timely hit rate and bytes over the cache, mean time per token over the link.

Axes begin at 0, but that of the link, which is logarithmic.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from cluster.errors import ConfigError
from cluster.replay.result import ReplayCell, compute_bound


def draw(cells: Sequence[ReplayCell], target: Path) -> None:
    """Write one figure of three panels, of the fewest sequences, at the middle link and cache.

    Raises:
        ConfigError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ConfigError("--plot needs matplotlib: pip install 'moesaic[bench]'") from error
    concurrency = min(cell.concurrency for cell in cells)
    shown = [cell for cell in cells if cell.concurrency == concurrency]
    links, caches = sorted({c.link_gb_per_s for c in shown}), sorted({c.cache for c in shown})
    link, cache = links[len(links) // 2], caches[len(caches) // 2]
    figure: Any = Figure(figsize=(17, 5))  # matplotlib's own annotations are partial
    axes = figure.subplots(1, 3)
    of_link = [c for c in shown if c.link_gb_per_s == link]
    _lines(axes[0], of_link, lambda c: 100 * c.cache, lambda c: c.timely_hit_rate)
    axes[0].set(xlabel="cache, % of experts", ylabel="timely hit rate", title=f"link {link:g} GB/s")
    _lines(axes[2], of_link, lambda c: 100 * c.cache, lambda c: c.bytes_per_token / 2**20)
    axes[2].set(xlabel="cache, % of experts", ylabel="MiB loaded per token", title=f"bytes, link {link:g} GB/s")
    of_cache = [c for c in shown if c.cache == cache]
    ahead = [c for c in of_cache if "+" in c.policy or c.policy == "lru"]
    compared = [c for c in of_cache if c.slowdown_to_oracle is not None]
    _lines(axes[1], ahead or of_cache, lambda c: c.link_gb_per_s, _slowdown if compared else lambda c: c.tpot_ms_mean)
    axes[1].set(
        xlabel="link, GB/s",
        ylabel="mean TPOT over oracle prefetch with Belady" if compared else "mean TPOT, ms",
        title=f"cache {100 * cache:g}% (grey: compute-bound)",
        xscale="log",
    )
    for machine in compute_bound(of_cache):
        axes[1].axvspan(machine.link_gb_per_s * 0.8, machine.link_gb_per_s * 1.25, color="0.9", zorder=0)
    for side in axes:
        side.set_ylim(bottom=0)
        if side is not axes[1]:
            side.set_xlim(left=0)
        side.legend(fontsize=7)
    figure.suptitle(f"replay in virtual time, {concurrency} sequence(s)")
    figure.tight_layout()
    figure.savefig(target, dpi=110)


def _slowdown(cell: ReplayCell) -> float:
    return cell.slowdown_to_oracle or 1.0


def _lines(
    axes: Any,
    cells: Sequence[ReplayCell],
    x: Callable[[ReplayCell], float],
    y: Callable[[ReplayCell], float],
) -> None:
    lines = {
        policy: sorted((x(cell), y(cell)) for cell in cells if cell.policy == policy)
        for policy in dict.fromkeys(cell.policy for cell in cells)
    }
    longest = max(len(points) for points in lines.values())
    for policy, points in lines.items():
        if len(points) < min(longest, 2):
            continue
        axes.plot([p[0] for p in points], [p[1] for p in points], marker="o", markersize=4, label=policy)
