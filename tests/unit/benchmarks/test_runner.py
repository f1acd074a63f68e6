"""The runner of benchmarks, with one that measures nothing: what it prints, what it writes, what it lists."""

from __future__ import annotations

import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path
from types import ModuleType

import pytest

from benchmarks.catalog import BENCHMARKS, TOPICS
from benchmarks.runner import main
from benchmarks.shared.declaration import Benchmark
from benchmarks.shared.pages import MARK
from benchmarks.shared.report import Report, Table

ROOT = Path(__file__).resolve().parents[3]
LONG = "a cell that is much longer than any terminal is wide, " * 5
BOXES = range(0x2500, 0x2580)


def _add_options(parser: ArgumentParser) -> None:
    parser.add_argument("--rows", type=int, default=2)


def _run(options: Namespace) -> Report:
    print("a library says something")  # noqa: T201 - a library's
    subprocess.run([sys.executable, "-c", "print('a child says something')"], check=True)
    report = Report("Fake")
    report.rows = [{"n": n, "time": 1.5 * n, "said": LONG} for n in range(options.rows)]
    report.rows.append({"n": 9, "only here": "a|b\nc", "never": None})
    report.at_least("kept", 2.0, 1.0)
    report.at_most("broken", float("inf"), 1.0)
    report.notes.append("one\nnote")
    return report


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> dict[str, Benchmark]:
    module = ModuleType("fake_measurement")
    module.run, module.add_options = _run, _add_options  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, module.__name__, module)
    fake = Benchmark(
        name="fake_one",
        module=module.__name__,
        description="Measures nothing",
        targets="one kept, one broken",
        meaning="First sentence. Second sentence.",
    )
    return {fake.name: fake}


def test_json_is_one_document_and_nothing_else(
    fakes: dict[str, Benchmark], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    code = main(["fake_one", "--json", "--markdown", "--rows", "3"], benchmarks=fakes, pages=tmp_path)
    out, err = capfd.readouterr()
    document = json.loads(out, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert code == 1
    assert [row["n"] for row in document["rows"]] == [0, 1, 2, 9]
    assert [target["met"] for target in document["targets"]] == [True, False]
    assert document["targets"][1]["value"] is None
    assert "a library says something" in err and "a child says something" in err


def test_a_page_is_plain_markdown_with_every_cell_in_full(
    fakes: dict[str, Benchmark], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fake_one", "--quick", "--markdown"], benchmarks=fakes, pages=tmp_path) == 1
    page = (tmp_path / "fake-one.md").read_text()
    assert page.startswith("# fake_one: Measures nothing\n")
    assert "`python -m benchmarks fake_one --quick --markdown`" in page
    assert "First sentence. Second sentence." in page
    assert LONG.strip() in page and "…" not in page
    assert not any(ord(character) in BOXES for character in page)
    assert "1 of 2 met" in page
    lines = {line.split("|")[1].strip(): line for line in page.splitlines() if line.startswith("|")}
    assert lines["kept"].endswith("| yes |") and lines["broken"].endswith("| NO  |")
    assert "a\\|b c" in lines["9"] and "- one note" in page
    for circumstance in ("machine", "date", "commit", "load average"):
        assert circumstance in lines
    tables = [block.splitlines() for block in page.split("\n\n") if block.startswith("|")]
    assert len(tables) == 3
    for table in tables:
        assert len({line.replace("\\|", "").count("|") for line in table}) == 1
    printed = capfd.readouterr().out
    assert LONG.strip() in printed and not any(ord(character) in BOXES for character in printed)


def test_raw_numbers_and_the_list_of_pages_are_written_beside(
    fakes: dict[str, Benchmark], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "by-hand.md").write_text("# What else was measured\n")
    (tmp_path / "by-hand.json").write_text('{"numbers": "of another form"}')
    main(["fake_one", "--markdown"], benchmarks=fakes, pages=tmp_path)
    raw = json.loads((tmp_path / "fake-one.json").read_text())
    assert raw["benchmark"] == "fake_one" and len(raw["rows"]) == 3
    assert set(raw["circumstances"]) == {"command", "machine", "date", "commit", "load_before", "load_after"}
    listed = (tmp_path / "README.md").read_text()
    assert "[fake-one](fake-one.md)" in listed and "1 of 2" in listed
    assert "[by-hand](by-hand.md)" in listed and "What else was measured" in listed
    assert "README.md" not in listed


def test_what_people_wrote_above_the_mark_stays(fakes: dict[str, Benchmark], tmp_path: Path) -> None:
    page = tmp_path / "fake-one.md"
    page.write_text(f"# Mine\n\nWhy it is so.\n\n{MARK}\n\nold numbers\n")
    main(["fake_one", "--markdown"], benchmarks=fakes, pages=tmp_path)
    head, _, measured = page.read_text().partition(MARK)
    assert head == "# Mine\n\nWhy it is so.\n\n"
    assert "1 of 2 met" in measured and "old numbers" not in measured


def test_people_are_shown_tables_instead_of_rows_where_there_are_some() -> None:
    report = Report("all", rows=[{"raw": 1}])
    assert [table.title for table in report.shown] == ["all"]
    report.tables = [Table("for people", [{"a": 1}])]
    assert [table.title for table in report.shown] == ["for people"]
    assert report.to_json()["rows"] == [{"raw": 1}]


def test_a_name_that_is_none_is_refused_with_those_there_are(
    fakes: dict[str, Benchmark], capfd: pytest.CaptureFixture[str]
) -> None:
    assert main(["fake_two"], benchmarks=fakes) == 2
    assert "fake_one" in capfd.readouterr().err


def test_every_benchmark_is_listed_with_one_line(capfd: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 0
    lines = capfd.readouterr().out.splitlines()
    for benchmark in BENCHMARKS.values():
        [line] = [line for line in lines if line.startswith(f"{benchmark.name} ")]
        assert line.endswith(benchmark.description)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_every_benchmark_says_what_it_is(name: str) -> None:
    benchmark = BENCHMARKS[name]
    assert benchmark.module.endswith(f".{name}"), "benchmark NAME lies in NAME.py"
    assert all((benchmark.description, benchmark.targets, benchmark.meaning))
    assert benchmark.meaning.count(". ") == 1 and benchmark.meaning.endswith("."), "two sentences"


def test_every_topic_declares_the_benchmarks_in_its_folder() -> None:
    folders = {path.parent.name for path in (ROOT / "benchmarks").glob("*/__init__.py")} - {"shared"}
    assert folders == {topic.__name__.rpartition(".")[2] for topic in TOPICS}
    for topic in TOPICS:
        folder = Path(topic.__file__ or "").parent
        assert len(list(folder.glob("*.py"))) <= 21
        measured = {path.stem for path in folder.glob("*.py") if "\ndef run(options" in path.read_text()}
        assert measured == {each.name for each in topic.BENCHMARKS if not each.has_own_command}


def test_the_list_is_shown_without_torch() -> None:
    script = "import sys, benchmarks.runner; print([m for m in ('torch', 'ray', 'transformers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.stdout == "[]\n", done.stderr
