"""Pictures of benchmark `offload`: time per token of every policy, and tokens per second of every side."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from benchmarks.shared.report import Report


def plot(target: Path, reports: dict[str, Report]) -> None:
    """Write a PNG with one panel a part."""
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
    rows = [row for row in rows if row["at a time"] == 1]
    policies = list(dict.fromkeys(row["policy"] for row in rows))
    settings = sorted({(float(row["cache"].rstrip("%")), row["GB/s"]) for row in rows})
    height = 0.8 / len(settings)
    for number, (cache, link) in enumerate(settings):
        times = {
            row["policy"]: row["TPOT mean ms"]
            for row in rows
            if (float(row["cache"].rstrip("%")), row["GB/s"]) == (cache, link)
        }
        positions = [i + number * height for i, policy in enumerate(policies) if policy in times]
        label = f"{cache:g}% fit, {link} GB/s"
        axis.barh(positions, [times[p] for p in policies if p in times], height, label=label)
    axis.set_yticks([i + 0.4 - height / 2 for i in range(len(policies))], policies)
    axis.invert_yaxis()
    axis.set(xlabel="mean time per output token, ms", title="Policies live, emulated link, one sequence")
    axis.legend(fontsize=8, loc="upper center", bbox_to_anchor=(0.5, -0.12), ncol=len(settings), frameon=False)


def _plot_peers(axis: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["at a time"] == 1]
    for side in dict.fromkeys(row["side"] for row in rows):
        own = [row for row in rows if row["side"] == side]
        axis.plot([float(row["cache"].rstrip("%")) for row in own], [row["tok/s"] for row in own], "o-", label=side)
    axis.set_yscale("log")
    axis.set(xlabel="experts that fit, %", ylabel="tokens/s", title="Equal memory, same throttled disk, one sequence")
    axis.legend(fontsize=8)
