"""vLLM's own OpenAI entry-point tests, from its source distribution, against `moesaic serve`.

Every test that asks a server runs, but those of features that Moesaic refuses by name or does not serve yet
(`vllm_kit/left_out.py`). Names of models, lengths and fixtures are changed (`vllm_kit/changes.py`), nothing else.
`--markdown FILE` writes the list of what was left out, by feature, and what failed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path

from benchmarks.clients.vllm_kit.changes import FILES, changed
from benchmarks.clients.vllm_kit.left_out import LEFT_OUT, feature_of
from benchmarks.shared.command_line import arguments, progress
from benchmarks.shared.models import DEMO
from benchmarks.shared.report import Report

_VERSION = "0.33.0"
_KIT = Path(__file__).resolve().parent / "vllm_kit"
_PACKAGES = (
    "torch>=2.13,<2.14",
    "transformers>=5.23,<6",
    "fastapi",
    "httpx",
    "jsonschema",
    "openai>=2",
    "pybase64",
    "pytest>=8.4,<9",  # schemathesis' fixture of the schema asks for an attribute that pytest 9 has no more
    "pytest-asyncio",
    "pytest-timeout",
    "regex",
    "requests",
    "schemathesis>=4.32,<5",
)
_MIN_TESTS = 85
_MIN_SHARE = 0.95


@dataclass(frozen=True, slots=True)
class Outcome:
    """What became of one test; `feature` is why it was left out, if it was."""

    test: str
    passed: bool
    feature: str | None
    message: str


def main() -> int:
    """Run and print; exit code 0 if the targets are met."""
    parser = arguments(__doc__ or "")
    parser.add_argument("--sdist", type=Path, help="vllm-0.33.0.tar.gz; default: downloaded with pip")
    parser.add_argument("--python", type=Path, help="environment with the tests' packages; default: one is made")
    parser.add_argument("--work", type=Path, help="where to work; default: a temporary folder")
    parser.add_argument("--markdown", type=Path, help="write what was left out, by feature, to this file")
    parser.add_argument("--keep", action="append", default=[], help="only tests whose id holds this text")
    given = parser.parse_args()
    work = given.work or Path(tempfile.mkdtemp(prefix="moesaic-vllm-"))
    work.mkdir(parents=True, exist_ok=True)
    python = given.python or _environment(work)
    laid = _lay_out(given.sdist or _download(work, python), work)
    outcomes = _run(python, laid, given.keep)
    report = _report(outcomes)
    if given.markdown:
        given.markdown.parent.mkdir(parents=True, exist_ok=True)
        given.markdown.write_text(_markdown(outcomes))
    return report.finish(as_json=given.json)


def _environment(work: Path) -> Path:
    """A new virtual environment with what the tests import."""
    folder = work / "environment"
    python = folder / "bin" / "python"
    if not python.is_file():
        progress(f"installing the tests' packages into {folder}")
        subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *_PACKAGES], check=True)
    return python


def _download(work: Path, python: Path) -> Path:
    """vLLM's source distribution. pip asks a package for its metadata: the builder's packages, without a build."""
    folder = work / "sdist"
    archive = folder / f"vllm-{_VERSION}.tar.gz"
    if not archive.is_file():
        progress(f"downloading vllm {_VERSION}'s source distribution")
        builders = ("setuptools>=77", "setuptools-scm", "setuptools-rust", "wheel", "cmake", "ninja", "jinja2")
        pip = [str(python), "-m", "pip"]
        subprocess.run([*pip, "install", "--quiet", *builders], check=True)
        environment = {**os.environ, "VLLM_TARGET_DEVICE": "empty", "VLLM_VERSION_OVERRIDE": _VERSION}
        download = (
            "download",
            "--quiet",
            "--no-deps",
            "--no-binary",
            "vllm",
            "--no-build-isolation",
            "-d",
            str(folder),
        )
        subprocess.run([*pip, *download, f"vllm=={_VERSION}"], check=True, env=environment)
    return archive


def _lay_out(archive: Path, work: Path) -> Path:
    """The chosen tests with their changes, and our stand-ins, below one folder."""
    laid = work / "laid"
    shutil.rmtree(laid, ignore_errors=True)
    entrypoints = laid / "tests" / "entrypoints"
    with tarfile.open(archive) as tar:
        for file in FILES:
            member = tar.extractfile(f"vllm-{_VERSION}/tests/entrypoints/{file}")
            assert member is not None, f"{file} is not in {archive}"
            target = entrypoints / file
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_text(changed(file, member.read().decode()))
    for folder in {laid / "tests", *(path.parent for path in entrypoints.rglob("*.py"))}:
        for package in (folder, *folder.parents):
            if package == laid:
                break
            (package / "__init__.py").touch()
    _lay_out_model(laid / DEMO.name)
    shutil.copy(_KIT / "utils.py", laid / "tests" / "utils.py")
    shutil.copy(_KIT / "conftest.py", laid / "tests" / "conftest.py")
    return laid


def _lay_out_model(folder: Path) -> None:
    """The demonstration model, whose author wants greedy answers: then what the tests ask for is sure."""
    folder.mkdir()
    for file in DEMO.iterdir():
        (folder / file.name).symlink_to(file)
    settings = json.loads((DEMO / "generation_config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "generation_config.json").write_text(json.dumps({**settings, "temperature": 0.0}))


def _run(python: Path, laid: Path, keep: Sequence[str]) -> list[Outcome]:
    """Collect, leave out, run."""
    environment = {
        **os.environ,
        "MOESAIC_COMMAND": str(Path(sys.executable).parent / "moesaic"),
        "MOESAIC_MODEL": str(DEMO),
        "MOESAIC_VERSION": metadata.version("moesaic"),
        "no_proxy": "127.0.0.1,localhost",
    }
    pytest = [
        str(python),
        "-m",
        "pytest",
        "-p",
        "no:cacheprovider",
        "-o",
        "asyncio_mode=strict",
        "--rootdir",
        str(laid),
    ]
    listed = subprocess.run(
        [*pytest, "--collect-only", "-q", "tests"], cwd=laid, env=environment, capture_output=True, text=True
    )
    ids = [line for line in listed.stdout.splitlines() if "::" in line and not line.startswith("ERROR")]
    if listed.returncode != 0:
        raise RuntimeError(f"collecting failed:\n{listed.stdout[-3000:]}{listed.stderr[-1000:]}")
    short = [_short(test) for test in ids]
    unused = [pattern for patterns in LEFT_OUT.values() for pattern in patterns if not _matches(pattern, short)]
    if unused:
        raise RuntimeError(f"left out, but not there: {unused}")
    chosen = [test for test in ids if feature_of(_short(test)) is None and all(text in test for text in keep)]
    progress(f"{len(ids)} tests, {len(chosen)} of them run")
    results = laid / "results.xml"
    subprocess.run([*pytest, "-q", "--timeout", "600", f"--junitxml={results}", *chosen], cwd=laid, env=environment)
    left = [Outcome(_short(test), False, feature_of(_short(test)), "") for test in ids if feature_of(_short(test))]
    return left + _read(results, {_short(test) for test in chosen})


def _matches(pattern: str, tests: Sequence[str]) -> bool:
    return any(re.search(pattern, test) for test in tests)


def _short(test: str) -> str:
    return test.removeprefix("tests/entrypoints/")


def _read(results: Path, chosen: set[str]) -> list[Outcome]:
    """What became of each test; one with parts of its own (subtests) passed if all of them did."""
    messages: dict[str, str | None] = {}
    for case in ElementTree.parse(results).getroot().iter("testcase"):
        file = case.get("classname", "").removeprefix("tests.entrypoints.").replace(".", "/") + ".py"
        test = f"{file}::{case.get('name')}"
        whole = test if test in chosen else test.partition("[")[0]
        faults = [child for child in case if child.tag in ("failure", "error", "skipped")]
        message = (faults[0].get("message") or "failed").strip().partition("\n")[0][:200] if faults else None
        messages[whole] = messages.get(whole) or message
    return [Outcome(test, message is None, None, message or "") for test, message in messages.items()]


def _report(outcomes: Sequence[Outcome]) -> Report:
    ran = [outcome for outcome in outcomes if outcome.feature is None]
    passed = sum(outcome.passed for outcome in ran)
    report = Report(title=f"vLLM {_VERSION}'s entry-point tests against Moesaic")
    for file in FILES:
        here = [outcome for outcome in outcomes if outcome.test.startswith(file)]
        kept = [outcome for outcome in here if outcome.feature is None]
        good = sum(outcome.passed for outcome in kept)
        report.rows.append({"file": file, "run": len(kept), "passed": good, "left out": len(here) - len(kept)})
    report.notes += [f"FAILED {outcome.test}: {outcome.message}" for outcome in ran if not outcome.passed]
    report.at_least("tests that remain", float(len(ran)), float(_MIN_TESTS))
    report.at_least("share of them that pass", passed / max(len(ran), 1), _MIN_SHARE)
    return report


def _markdown(outcomes: Sequence[Outcome]) -> str:
    ran = [outcome for outcome in outcomes if outcome.feature is None]
    lines = [
        f"# vLLM {_VERSION}'s entry-point tests",
        "",
        "Written by `python -m benchmarks vllm_entrypoints --markdown docs/measured/vllm-entrypoints.md`.",
        "",
        f"{sum(outcome.passed for outcome in ran)} of {len(ran)} tests pass. Changed in them are names of models, "
        "lengths and fixtures only (`benchmarks/clients/vllm_kit/changes.py`).",
        "",
        "## Failed",
        "",
        *([f"- `{outcome.test}`: {outcome.message}" for outcome in ran if not outcome.passed] or ["none"]),
        "",
        "## Left out, by feature",
    ]
    for feature in LEFT_OUT:
        tests = [outcome.test for outcome in outcomes if outcome.feature == feature]
        lines += ["", f"### {feature} ({len(tests)})", "", *(f"- `{test}`" for test in tests)]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.exit(main())
