"""Reads the Dockerfile: its instructions, and what it takes from the checkout."""

from __future__ import annotations

import shlex
import shutil
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions() -> list[tuple[str, list[str]]]:
    """Keyword and words of every instruction."""
    text = (ROOT / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(keyword, shlex.split(rest)) for keyword, _, rest in (line.partition(" ") for line in lines)]


def copied() -> set[str]:
    """What COPY takes from the checkout."""
    lines = [words for keyword, words in instructions() if keyword == "COPY"]
    return {source for words in lines if not words[0].startswith("--from") for source in words[:-1]}


def copy_sources(target: Path) -> None:
    """Put there what the image is built from."""
    for source in sorted(copied()):
        (target / source).parent.mkdir(parents=True, exist_ok=True)
        if (ROOT / source).is_dir():
            shutil.copytree(ROOT / source, target / source, ignore=shutil.ignore_patterns("__pycache__", "*.so"))
        else:
            shutil.copy(ROOT / source, target / source)
