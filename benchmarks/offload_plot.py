"""Pictures of `offload.py`: time per token of every policy, and tokens per second of every side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from harness import Report


def plot(target: Path, reports: dict[str, Report]) -> None:
    """Write a PNG with one panel a part; of several cache sizes the last is drawn for the policies."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, len(reports), figsize=(6.5 * len(reports), 4.2), squeeze=False)
    for axis, (part, report) in zip(axes[0], reports.items(), strict=True):
        (_plot_live if part == "live" else _plot_peers)(axis, report.rows)
    figure.tight_layout()
    figure.savefig(target, dpi=110)
    plt.close(figure)


def _plot_live(axis: Any, rows: list[dict[str, Any]]) -> None:
    cache = rows[-1]["cache"]
    rows = [row for row in rows if row["cache"] == cache and row["at a time"] == 1]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    links = list(dict.fromkeys(row["GB/s"] for row in rows))
    height = 0.8 / len(links)
    for number, link in enumerate(links):
        times = {row["policy"]: row["TPOT mean ms"] for row in rows if row["GB/s"] == link}
        positions = [i + number * height for i, policy in enumerate(policies) if policy in times]
        axis.barh(positions, [times[p] for p in policies if p in times], height, label=f"{link} GB/s (emulated)")
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(policies))], policies)
    axis.invert_yaxis()
    axis.set(xlabel="mean time per output token, ms", title=f"Policies live, cache {cache}, one sequence")
    axis.legend(fontsize=8)


def _plot_peers(axis: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["at a time"] == 1]
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side]
        axis.plot([float(row["cache"].rstrip("%")) for row in own], [row["tok/s"] for row in own], "o-", label=side)
    axis.set_yscale("log")
    axis.set(xlabel="experts that fit, %", ylabel="tokens/s", title="Equal memory, same throttled disk, one sequence")
    axis.legend(fontsize=8)
