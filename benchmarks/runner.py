"""Runs a benchmark by its name, prints what it found, and writes its page where that is wanted."""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path

from benchmarks.catalog import BENCHMARKS, listing
from benchmarks.shared.circumstances import Circumstances
from benchmarks.shared.command_line import arguments, progress
from benchmarks.shared.declaration import Benchmark
from benchmarks.shared.pages import PAGES, write_page
from benchmarks.shared.report import Report

_USAGE = "python -m benchmarks NAME [--quick] [--json] [--markdown]; NAME --help tells what else it takes\n"


def main(
    words: Sequence[str] | None = None, *, benchmarks: Mapping[str, Benchmark] = BENCHMARKS, pages: Path = PAGES
) -> int:
    """The command. Exit code: 0; 1 if a target was missed; 2 for a name that is none.

    Args:
        words: what follows `python -m benchmarks`; None: of this process.
        benchmarks: those that can be named.
        pages: the folder of results.
    """
    words = list(sys.argv[1:] if words is None else words)
    if not words or words[0] in ("-h", "--help"):
        sys.stdout.write(f"{_USAGE}\n{listing(benchmarks)}")
        return 0
    if words == ["--names"]:  # of those that `make bench` runs
        sys.stdout.write("".join(f"{each.name}\n" for each in benchmarks.values() if each.in_make_bench))
        return 0
    if words[0] not in benchmarks:
        sys.stderr.write(f"no benchmark {words[0]!r}; there are: {', '.join(benchmarks)}\n")
        return 2
    return _run(benchmarks[words[0]], words[1:], pages)


def _run(benchmark: Benchmark, words: list[str], pages: Path) -> int:
    command = shlex.join(["python", "-m", "benchmarks", benchmark.name, *words])
    if benchmark.has_own_command:
        sys.argv = [f"python -m benchmarks {benchmark.name}", *words]
        return benchmark.load().main()
    module = benchmark.load()
    parser = arguments(module.__doc__ or "", program=f"python -m benchmarks {benchmark.name}")
    parser.add_argument("--markdown", action="store_true", help=f"write {PAGES.name}/{benchmark.page}.md and its .json")
    if hasattr(module, "add_options"):
        module.add_options(parser)
    options = parser.parse_args(words)
    with _chatter_on_stderr():
        report: Report = module.run(options)
    if options.markdown:
        found = Circumstances.now(command, report.load_before[0])
        progress(f"wrote {write_page(benchmark, report, found, pages)}")
    return report.finish(as_json=options.json)


@contextmanager
def _chatter_on_stderr() -> Iterator[None]:
    """What libraries and child processes print meanwhile is no result: it goes to standard error."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)
