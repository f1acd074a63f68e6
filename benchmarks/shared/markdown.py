"""Reports as plain Markdown: for the terminal and for pages in docs/measured.

Tables have every cell in full and one line a row, whatever that makes of the width.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.shared.circumstances import Circumstances, machine

if TYPE_CHECKING:
    from benchmarks.shared.declaration import Benchmark
    from benchmarks.shared.report import Report

_NOTHING = "-"


def table_text(rows: Sequence[Mapping[str, Any]]) -> str:
    """A Markdown table; its columns are those of all rows, in the order in which they first come."""
    columns = list(dict.fromkeys(name for row in rows for name in row))
    lines = [[_cell(name) for name in columns], *([_cell(row.get(name)) for name in columns] for row in rows)]
    widths = [max(3, *(len(line[i]) for line in lines)) for i in range(len(columns))]
    is_number = [_is_number_column(rows, name) for name in columns]
    rule = ["-" * (width - 1) + ":" if right else "-" * width for width, right in zip(widths, is_number, strict=True)]

    def written(cells: Sequence[str]) -> str:
        padded = (
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(cells, widths, is_number, strict=True)
        )
        return f"| {' | '.join(padded)} |"

    return "\n".join(written(cells) for cells in (lines[0], rule, *lines[1:])) + "\n"


def report_text(report: Report) -> str:
    """Tables, targets, notes and circumstances, for a terminal."""
    parts = [f"{table.title}\n\n{table_text(table.rows)}" for table in report.shown]
    if report.targets:
        parts.append(f"Targets\n\n{table_text(_target_rows(report))}")
    before, after = report.load_before[0], os.getloadavg()[0]
    parts.append("\n".join([*report.notes, f"{machine()}; load average {before:.2f} before, {after:.2f} after"]) + "\n")
    return "\n".join(parts)


def page_head(benchmark: Benchmark) -> str:
    """How a new page begins; people may write more here."""
    return f"# {benchmark.name}: {benchmark.description}\n\n{benchmark.meaning}\n"


def measured_text(benchmark: Benchmark, report: Report, found: Circumstances) -> str:
    """What was measured, for a page of docs/measured."""
    parts = [
        f"Raw numbers: [{benchmark.page}.json]({benchmark.page}.json).\n",
        table_text([{"circumstance": name, "value": value} for name, value in found.lines().items()]),
        "## Targets\n",
    ]
    if report.targets:
        met = sum(target.met for target in report.targets)
        parts += [f"{met} of {len(report.targets)} met.\n", table_text(_target_rows(report))]
    else:
        parts.append(f"None: {benchmark.targets}.\n")
    for table in report.shown:
        parts += [f"## {table.title}\n", table_text(table.rows)]
    if report.notes:
        parts += ["## Notes\n", "".join(f"- {_one_line(note)}\n" for note in report.notes)]
    return "\n".join(parts)


def _target_rows(report: Report) -> list[dict[str, Any]]:
    return [
        {"target": t.name, "wanted": t.target, "measured": t.value, "met": "yes" if t.met else "NO"}
        for t in report.targets
    ]


def _cell(value: Any) -> str:
    if value is None:
        return _NOTHING
    text = f"{value:.4g}" if isinstance(value, float) else str(value)
    return _one_line(text).replace("|", "\\|")


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _is_number_column(rows: Sequence[Mapping[str, Any]], name: str) -> bool:
    return all(isinstance(row.get(name), int | float | None) for row in rows)
