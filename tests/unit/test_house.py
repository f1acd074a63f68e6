"""How the tree lies: no folder or file is too large, nothing is loose where rooms are."""

from __future__ import annotations

import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MOST_FILES, MOST_LINES, MOST_ROOMS = 20, 350, 13

MORE_FILES = {"cluster/cli": "a file for each command, and the flags that they share"}
"""Folders with more than MOST_FILES files, and why."""

MORE_LINES: dict[str, str] = {}
"""Files with more than MOST_LINES lines, and why."""

DECISIONS = {
    "cluster.model.sizing",
    "cluster.placement.planner",
    "cluster.policies.eviction.lru",
    "cluster.policies.next_use.estimate",
    "cluster.policies.next_use.hazards",
    "cluster.policies.prefetch.moesaic",
    "cluster.policies.prefetch.next_gate",
    "cluster.policies.residency",
    "cluster.policies.ring",
    "cluster.replay.link",
    "cluster.replay.machine",
    "cluster.replay.simulator",
    "cluster.routing.worker_choice",
    "cluster.scaling.rules",
}
"""Modules of pure decisions: each has an example."""


def _files() -> list[Path]:
    folders = ("cluster", "actors", "tests", "benchmarks", "docs", "deploy", "helm", "proto")
    found = [file for folder in folders for file in (ROOT / folder).rglob("*.py")]
    return [file for file in found if "_pb2" not in file.name and "build" not in file.relative_to(ROOT).parts]


def test_no_folder_is_crowded() -> None:
    counts: dict[str, int] = {}
    for file in _files():
        if file.name != "__init__.py":
            folder = str(file.parent.relative_to(ROOT))
            counts[folder] = counts.get(folder, 0) + 1

    crowded = {folder for folder, count in counts.items() if count > MOST_FILES}
    assert crowded == set(MORE_FILES), "split the folder, or take out an exception that is none any more"


def test_no_file_is_long() -> None:
    lines = {str(file.relative_to(ROOT)): len(file.read_text().splitlines()) for file in _files()}

    long = {file for file, count in lines.items() if count > MOST_LINES}
    assert long == set(MORE_LINES), "split the file by meaning, or take out an exception that is none any more"


def test_actors_has_rooms_and_nothing_loose() -> None:
    loose = [file.name for file in (ROOT / "actors").glob("*.py")]
    rooms = [path for path in (ROOT / "actors").iterdir() if (path / "__init__.py").is_file()]

    assert loose == ["__init__.py"]
    assert len(rooms) <= MOST_ROOMS


def _modules_with_examples() -> list[str]:
    files = [file for file in _files() if file.parts[len(ROOT.parts)] in ("cluster", "actors")]
    return sorted(
        ".".join(file.relative_to(ROOT).with_suffix("").parts) for file in files if ">>> " in file.read_text()
    )


def test_pure_decisions_have_examples() -> None:
    assert set(_modules_with_examples()) >= DECISIONS


@pytest.mark.parametrize("name", _modules_with_examples())
def test_examples_run(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))

    assert result.attempted > 0 and result.failed == 0
