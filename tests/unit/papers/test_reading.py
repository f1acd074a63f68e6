"""README and docs can be read: short enough, no terminal tables, words explained, generated pages as the code is."""

from __future__ import annotations

import re

import pytest
from papers import DOCS, README, Page, pages, script

_MAX_README_LINES = 250
_MAX_TABLE_ROWS = 12
_BOX_CHARACTERS = re.compile("[\u2500-\u257f]")

every_page = pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)


def test_readme_is_short() -> None:
    assert len(README.read_text().splitlines()) <= _MAX_README_LINES


def test_readme_begins_with_the_two_commands() -> None:
    (first, *_) = Page(README).blocks("sh")
    assert [line.split()[:2] for line in first.splitlines()] == [["make", "serve"], ["make", "test-all"]]


def test_the_measured_table_is_short_and_says_what_was_missed() -> None:
    section = README.read_text().partition("## Measured\n")[2].partition("\n## ")[0]
    head, _, *rows = [line for line in section.splitlines() if line.startswith("|")]
    assert _cells(head) == ["claim", "ours", "peer", "machine", "command", "met"]
    assert len(rows) <= _MAX_TABLE_ROWS
    assert {_cells(row)[-1] for row in rows} <= {"yes", "**missed**"}


@every_page
def test_no_terminal_tables(page: Page) -> None:
    assert not _BOX_CHARACTERS.findall(page.text)


@every_page
def test_no_cell_is_cut_off_and_no_row_is_short(page: Page) -> None:
    width = 0
    for line in page.text.splitlines():
        if not line.startswith("|"):
            width = 0
            continue
        cells = _cells(line)
        width = width or len(cells)
        assert len(cells) == width, line
        assert not [cell for cell in cells if cell.endswith(("\u2026", "..."))], line


def test_generated_pages_are_as_the_code_is() -> None:
    assert script("generate").stale() == [], "run `python docs/generate.py`"


def test_stale_pages_are_found(tmp_path) -> None:
    module = script("generate")
    for name, text in module.pages().items():
        (tmp_path / name).write_text(text.replace("experts.cache", "experts.old_name"))
    assert module.stale(tmp_path) == ["config.md"]


def test_readme_explains_glossary_words_where_they_first_appear() -> None:
    """There a word is in a link to the glossary, or in bold: then its sentence explains it. Headings, tables' heads and
    code are left out."""
    unexplained = [word for word in _glossary() if not _is_explained(word)]
    assert not unexplained


def test_the_glossary_is_in_order_and_says_each_word_once() -> None:
    words = [word.lower() for word in _glossary()]
    assert words == sorted(set(words))


def _cells(row: str) -> list[str]:
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]]


def _glossary() -> list[str]:
    section = (DOCS / "architecture.md").read_text().partition("## Glossary\n")[2]
    return [_cells(line)[0] for line in section.splitlines() if line.startswith("| ")][1:]


def _is_explained(word: str) -> bool:
    text = _prose()
    found = re.search(rf"\b{re.escape(word)}(s|es|ed|d|ing)?\b", text, re.IGNORECASE)
    if found is None:
        return True  # README does not use it
    before, after = text[: found.start()], text[found.end() :]
    is_linked = before.rpartition("[")[2].find("]") < 0 and re.match(
        r"[^\[\]]*\]\(docs/architecture\.md#glossary\)", after
    )
    is_bold = before.endswith("**") and after.startswith("**")
    return bool(is_linked) or is_bold


def _prose() -> str:
    text = re.sub(r"```.*?```", "", README.read_text(), flags=re.DOTALL)
    lines = [line for line in text.splitlines() if not line.startswith(("#", "    ", "!["))]
    without_heads = [line for line, below in zip(lines, [*lines[1:], ""], strict=True) if not below.startswith("|---")]
    text = re.sub(r"`[^`]*`|Mixture-of-Experts", "", "\n".join(without_heads))
    # Names of pages in links to other places are no use of a word.
    return re.sub(r"\[[^\[\]]*\]\((?!docs/architecture\.md#glossary)[^)]*\)", "", text)
