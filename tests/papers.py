"""README and `docs/` as the tests of papers read them: pages, code, commands, links, headings.

Decision records are history, so they are not among the pages.
"""

from __future__ import annotations

import importlib.util
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from types import ModuleType

from markdown_it import MarkdownIt
from markdown_it.token import Token

ROOT = Path(__file__).resolve().parents[1]
README = ROOT / "README.md"
DOCS = ROOT / "docs"


@dataclass(frozen=True, slots=True)
class Page:
    """One Markdown file."""

    path: Path

    @property
    def name(self) -> str:
        """Its path within the repository."""
        return self.path.relative_to(ROOT).as_posix()

    @property
    def text(self) -> str:
        """All of it."""
        return self.path.read_text()

    def tokens(self) -> list[Token]:
        """Block and inline tokens, in order."""
        return _tokens(self.text)

    def spans(self) -> list[str]:
        """Inline code."""
        return [token.content for token in self.tokens() if token.type == "code_inline"]

    def blocks(self, language: str) -> list[str]:
        """Fenced code of that language."""
        return [token.content for token in self.tokens() if token.type == "fence" and token.info.strip() == language]

    def command_lines(self) -> Iterator[list[str]]:
        """Commands of shell blocks and of inline code, as words without comments; `;`, `&&` and `|` part commands."""
        lines = [line for block in self.blocks("sh") for line in block.replace("\\\n", " ").splitlines()]
        for line in [*lines, *(span for span in self.spans() if " " in span)]:
            yield from _commands(line)

    def links(self) -> list[str]:
        """Where links and images lead."""
        found = [token.attrGet("href") or token.attrGet("src") for token in self.tokens()]
        return [str(target) for target in found if target]

    def anchors(self) -> set[str]:
        """Names of headings, as GitHub makes them."""
        tokens = self.tokens()
        titles = [after.content for token, after in pairwise(tokens) if token.type == "heading_open"]
        return {re.sub(r"[^\w\- ]", "", title.lower()).strip().replace(" ", "-") for title in titles}


@cache
def _tokens(text: str) -> list[Token]:
    blocks = MarkdownIt("commonmark").enable("table").parse(text)
    return [token for block in blocks for token in (block, *(block.children or ()))]


@cache
def pages() -> tuple[Page, ...]:
    """README, CONTRIBUTING and every page of docs/ but the decision records."""
    inside = [path for path in sorted(DOCS.rglob("*.md")) if "decisions" not in path.relative_to(DOCS).parts]
    return tuple(map(Page, [README, ROOT / "CONTRIBUTING.md", *inside]))


def script(name: str) -> ModuleType:
    """A script of docs/, which are in no package."""
    spec = importlib.util.spec_from_file_location(f"docs_{name}", DOCS / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _commands(line: str) -> Iterator[list[str]]:
    try:
        words = shlex.split(line, comments=True)
    except ValueError:  # prose or code, no command line
        return
    command: list[str] = []
    for word in words:
        if word in (";", "&&", "|"):
            yield command
            command = []
        else:
            command.append(word.removesuffix(";"))
            if word.endswith(";"):
                yield command
                command = []
    if command:
        yield command
