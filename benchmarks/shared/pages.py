"""Pages of results in docs/measured: one for each benchmark, its raw numbers beside it, and a list of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.shared.circumstances import Circumstances
from benchmarks.shared.declaration import Benchmark
from benchmarks.shared.markdown import page_text, table_text
from benchmarks.shared.models import REPOSITORY
from benchmarks.shared.report import Report, json_text

PAGES = REPOSITORY / "docs" / "measured"
_LIST = "README.md"


def write_page(benchmark: Benchmark, report: Report, found: Circumstances, folder: Path) -> Path:
    """Write a benchmark's page, its raw numbers and the list of pages anew.

    Returns:
        the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": benchmark.name, "circumstances": asdict(found), **report.to_json()}
    (folder / f"{benchmark.page}.json").write_text(json_text(document))
    page = folder / f"{benchmark.page}.md"
    page.write_text(page_text(benchmark, report, found))
    (folder / _LIST).write_text(_list_text(folder))
    return page


def _list_text(folder: Path) -> str:
    """What each page is about, by its own first line; numbers of those that have some beside them."""
    rows: list[dict[str, str]] = []
    for page in sorted(folder.glob("*.md")):
        if page.name == _LIST:
            continue
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        raw = page.with_suffix(".json")
        row = {"page": f"[{page.stem}]({page.name})", "about": title, "measured": "", "targets met": ""}
        if raw.is_file():
            document = json.loads(raw.read_text())
            targets = document["targets"]
            row["measured"] = document["circumstances"]["date"]
            row["targets met"] = f"{sum(t['met'] for t in targets)} of {len(targets)}" if targets else "none promised"
        rows.append(row)
    return (
        "# What was measured\n\n"
        "A page for each benchmark, as its last run with `--markdown` wrote it (`python -m benchmarks` lists them); "
        "a target that was missed is shown as missed.\n\n" + table_text(rows)
    )
