"""Pages of results in docs/measured: one for each benchmark, its raw numbers beside it, and a list of them."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path

from benchmarks.shared.circumstances import Circumstances
from benchmarks.shared.declaration import Benchmark
from benchmarks.shared.markdown import measured_text, page_head, table_text
from benchmarks.shared.models import REPOSITORY
from benchmarks.shared.report import Report, json_text

PAGES = REPOSITORY / "docs" / "measured"
MARK = "<!-- From here on written by python -m benchmarks: change nothing by hand. -->"
_LIST = "README.md"
_LIST_HEAD = """# Measured

Each page is the output of one benchmark, with the date, the machine, the command, the targets and what was missed.
`NO` in a column "met" is a target that was missed. `python -m benchmarks` lists all benchmarks, with `--markdown` one
writes its page, and this list.

"""


def write_page(benchmark: Benchmark, report: Report, found: Circumstances, folder: Path) -> Path:
    """Write a benchmark's page, its raw numbers and the list of pages anew.

    What people wrote above the mark of a page that is there already stays.

    Returns:
        the page.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = {"benchmark": benchmark.name, "circumstances": asdict(found), **report.to_json()}
    (folder / f"{benchmark.page}.json").write_text(json_text(document))
    page = folder / f"{benchmark.page}.md"
    head, mark, _ = page.read_text().partition(MARK) if page.is_file() else ("", "", "")
    head = head if mark else f"{page_head(benchmark)}\n"
    page.write_text(f"{head}{MARK}\n\n{measured_text(benchmark, report, found)}")
    (folder / _LIST).write_text(_list_text(folder))
    return page


def _list_text(folder: Path) -> str:
    """What each page is about, by its own first line; when, and targets met, of those with raw numbers beside them."""
    rows: list[dict[str, str]] = []
    for page in sorted(folder.glob("*.md")):
        if page.name == _LIST:
            continue
        title = page.read_text().partition("\n")[0].removeprefix("# ")
        link = f"[{page.stem}]({page.name})"
        row = {"page": link, "about": title, "measured": "see there", "targets met": "see there"}
        raw = page.with_suffix(".json")
        document = json.loads(raw.read_text()) if raw.is_file() else {}
        if "benchmark" in document:  # other measurements keep raw numbers of their own form
            targets = document["targets"]
            row["measured"] = document["circumstances"]["date"]
            row["targets met"] = f"{sum(t['met'] for t in targets)} of {len(targets)}" if targets else "none promised"
        rows.append(row)
    return _LIST_HEAD + table_text(rows)
