"""Names of public classes: each belongs to one class, and none is a word that says nothing or means several things."""

from __future__ import annotations

import ast
import re
from collections import defaultdict
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]

# A word of a name, and what to say instead. The glossary in docs/architecture.md has the words that are used.
BANNED = {
    "Conductor": "PolicyRunner",
    "Exchange": "what is given and taken: a report, directives",
    "Followed": "a step under way",
    "LoadAhead": "prefetch",
    "Learned": "policy state",
    "Kept": "protected",
    "Published": "a snapshot",
    "Spare": "free capacity",
    "Parts": "what they are parts of",
    "With": "what it adds",
    "KindOf": "prompt cluster",
    "Helper": "what it helps with",
    "Manager": "what it does",
    "Utils": "what it does",
}
WHOLE = {"Link", "Part", "Form", "Plan", "Step", "Stage", "Store", "Sent", "Transfer", "Runner"}
BANNED_MODULES = {
    "conductor", "exchange", "followed", "kept", "learned", "live_inputs", "parts", "published", "spare", "with",
    "helper", "helpers", "manager", "utils",
}  # fmt: skip
"""Words that no module's name has."""


def public_classes() -> dict[str, list[str]]:
    """Files by the name of a class."""
    found: dict[str, list[str]] = defaultdict(list)
    for package in ("cluster", "actors"):
        for path in sorted((ROOT / package).rglob("*.py")):
            if "_pb2" in path.name:
                continue
            for node in ast.parse(path.read_text()).body:
                if isinstance(node, ast.ClassDef) and not node.name.startswith("_"):
                    found[node.name].append(str(path.relative_to(ROOT)))
    return found


CLASSES = public_classes()


def test_each_name_belongs_to_one_class() -> None:
    twice = {name: files for name, files in CLASSES.items() if len(files) > 1}
    assert not twice


@pytest.mark.parametrize("word", sorted(BANNED))
def test_no_class_has_a_banned_word(word: str) -> None:
    having = [name for name in CLASSES if re.search(rf"{word}(?![a-z])", name)]
    assert not having, f"say {BANNED[word]} instead"


def test_words_that_mean_several_things_stand_with_another() -> None:
    assert not WHOLE & set(CLASSES)


def test_no_module_has_a_banned_word() -> None:
    modules = [path for package in ("cluster", "actors") for path in (ROOT / package).rglob("*.py")]
    having = [str(path.relative_to(ROOT)) for path in modules if BANNED_MODULES & {path.stem, *path.stem.split("_")}]
    assert not having
