"""Groundwork: what is built and tested but not wired says so, is listed in the papers, and is used by nobody live.

A mark is a paragraph of a docstring that begins with `Groundwork:`. What gets wired loses its mark here, there and in
`docs/architecture.md`.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest
from papers import DOCS, ROOT

WIRED_BY = {
    "actors.engine.model_runner.ModelRunner.execute_interleaved": {"execute_interleaved"},
    "actors.experts.memory.cuda": {"import actors.experts.memory.cuda"},
    "cluster.placement.cost.Regime": {"PlacementHost(link_row_s=)", "replace(link_row_s=)"},
    "cluster.placement.free_capacity.gather_pairs": {"PlacementInputs(pairs=)", "replace(pairs=)"},
    "cluster.placement.tiering": {"PlacementInputs(tiers=)", "replace(tiers=)"},
    "cluster.replay.fleet": {"import cluster.replay.fleet"},
}
"""Everything that is groundwork, and what live code would say if it were wired: the name of a method, an import, or an
argument that nobody gives."""


def _module(file: Path) -> str:
    parts = file.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@cache
def _trees() -> dict[str, ast.Module]:
    """Every module of the program, by its name."""
    files = [file for folder in ("cluster", "actors") for file in sorted((ROOT / folder).rglob("*.py"))]
    return {_module(file): ast.parse(file.read_text()) for file in files if "_pb2" not in file.name}


def _documented(node: ast.AST, name: str) -> Iterator[tuple[str, str]]:
    """Names and docstrings of a module and of the classes and functions in it."""
    if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
        yield name, ast.get_docstring(node) or ""
        for inner in node.body:
            yield from _documented(inner, f"{name}.{getattr(inner, 'name', '')}")


def _marked() -> set[str]:
    found = (each for module, tree in _trees().items() for each in _documented(tree, module))
    return {name for name, text in found if re.search(r"(^|\n\n)Groundwork: ", text)}


def _said(tree: ast.Module) -> Iterator[str]:
    """The imports of a module, the attributes it names, and the named arguments that it gives."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (f"import {alias.name}" for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield f"import {node.module}"
            yield from (f"import {node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Attribute):
            yield node.attr
        elif isinstance(node, ast.Call):
            called = getattr(node.func, "id", getattr(node.func, "attr", ""))
            yield from (f"{called}({keyword.arg}=)" for keyword in node.keywords)


def _wiring(said: str, signs: set[str]) -> bool:
    """An import of something in a package is one of the package."""
    return any(said == sign or (sign.startswith("import ") and said.startswith(f"{sign}.")) for sign in signs)


def test_each_mark_is_listed_and_each_entry_is_marked() -> None:
    assert _marked() == set(WIRED_BY)


def test_the_papers_list_the_same() -> None:
    section = (DOCS / "architecture.md").read_text().partition("\n## Groundwork\n")[2].partition("\n## ")[0]
    assert set(re.findall(r"^\| `([\w.]+)` \|", section, re.MULTILINE)) == set(WIRED_BY)


@pytest.mark.parametrize("name", sorted(WIRED_BY))
def test_nothing_live_uses_it(name: str) -> None:
    own = next(part for part in (name, *_outer(name)) if part in _trees())
    others = {module: tree for module, tree in _trees().items() if not f"{module}.".startswith(f"{own}.")}
    using = {module: wiring for module, tree in others.items() if (wiring := _uses(tree, WIRED_BY[name]))}
    assert not using, "it is wired now: take the mark, the entry here and the one in docs/architecture.md away"


def _outer(name: str) -> Iterator[str]:
    while "." in name:
        name = name.rpartition(".")[0]
        yield name


def _uses(tree: ast.Module, signs: set[str]) -> set[str]:
    return {said for said in _said(tree) if _wiring(said, signs)}


def test_what_would_wire_something_is_seen() -> None:
    tree = ast.parse("from a.b import c\nimport d\nrunner.go(x)\nreplace(inputs, tiers=1)\n")
    for sign in ("import a.b", "import a.b.c", "import a", "import d", "go", "replace(tiers=)"):
        assert _uses(tree, {sign})
    for sign in ("import a.c", "import b", "x", "replace(pairs=)"):
        assert not _uses(tree, {sign})
