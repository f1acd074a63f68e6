"""The figure of benchmark `placement`: balance by method, and what it took to get there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

_METHODS = ("contiguous", "random", "EPLB", "ours", "oracle")
_COLOURS = dict(zip(_METHODS, ("#b0b0b0", "#d0d0d0", "#e39b3c", "#2f6fb0", "#7fb37f"), strict=True))
_HOSTS, _ROOM = 8, "12.5%"


def draw(rows: list[dict[str, Any]], target: Path) -> None:
    """Two panels: largest over mean load in the second period, and experts carried, ours against EPLB's."""
    from matplotlib.figure import Figure

    shown = [row for row in rows if row["room"] == _ROOM and row["hosts"] == _HOSTS]
    figure: Any = Figure(figsize=(13, 5))
    loads, moved = figure.subplots(1, 2, width_ratios=(2, 1))
    width = 0.8 / len(_METHODS)
    for number, method in enumerate(_METHODS):
        positions = [at + (number - 2) * width for at in range(len(shown))]
        loads.bar(positions, [row[method] - 1 for row in shown], width, bottom=1, label=method, color=_COLOURS[method])
    loads.set_xticks(range(len(shown)), [row["loads"].replace(", ", "\n") for row in shown])
    loads.set(ylabel="largest over mean host load", title=f"second period, {_HOSTS} hosts, {_ROOM} room for replicas")
    loads.legend(fontsize=8)
    for name, method, marker in (("ours", "ours", "o"), ("moved_EPLB", "EPLB", "s")):
        key = "moved" if method == "ours" else name
        moved.scatter(
            [row[key] for row in rows],
            [row[method] for row in rows],
            label=method,
            color=_COLOURS[method],
            marker=marker,
            s=22,
        )
    moved.set(
        xlabel="experts carried", ylabel="largest over mean host load", title="all hosts and room", xscale="symlog"
    )
    moved.legend(fontsize=8)
    figure.suptitle("Placement planned on one period, scored on the next (1 is level)")
    figure.tight_layout()
    figure.savefig(target, dpi=110)
