"""What README and docs name exists: paths, `make` targets, commands, flags, settings, metrics, routes and links."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from urllib.parse import unquote

import click
import pytest
import typer
import yaml
from papers import DOCS, README, ROOT, Page, pages

from benchmarks.catalog import BENCHMARKS
from cluster.cli.main import app
from cluster.config.load import MoesaicConfig

every_page = pytest.mark.parametrize("page", pages(), ids=lambda page: page.name)

_FOLDERS = ("cluster", "actors", "benchmarks", "tests", "docs", "deploy", "helm", "proto", "models", ".ci")
_PATH = re.compile(rf"^({'|'.join(map(re.escape, _FOLDERS))})(/[\w.-]+)*/?$")
_SECTIONS = MoesaicConfig.model_fields


@every_page
def test_paths_exist(page: Page) -> None:
    missing = [word for word in _code_words(page) if _is_path(word) and not (ROOT / word).exists()]
    assert not missing


def test_a_newcomers_questions_have_a_folder_each() -> None:
    """And the files named in the answer lie in one of its folders."""
    section = (DOCS / "architecture.md").read_text().partition("## Where is it decided\n")[2].partition("\n## ")[0]
    answers = dict(re.findall(r"^\| ([^|]*\?) \| (.*) \|$", section, re.MULTILINE))
    assert len(answers) >= 10
    for question, answer in answers.items():
        folders = [ROOT / name for name in re.findall(r"`([\w/]+/)`", answer)]
        assert folders and all(folder.is_dir() for folder in folders), question
        for name in re.findall(r"`(\w+\.py)`", answer):
            assert any((folder / name).is_file() for folder in folders), f"{question} {name}"


@every_page
def test_python_files_named_without_a_folder_exist(page: Page) -> None:
    names = {span for span in page.spans() if re.fullmatch(r"\w+\.py", span)}
    assert names <= _python_files()


@every_page
def test_make_targets_exist(page: Page) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    named = {command[1] for command in page.command_lines() if command[:1] == ["make"] and len(command) > 1}
    assert {name for name in named if re.fullmatch(r"[a-z-]+", name)} <= targets


@every_page
def test_commands_and_their_flags_exist(page: Page) -> None:
    wrong: list[str] = []
    for words in page.command_lines():
        if not (words and Path(words[0]).name == "moesaic" and len(words) > 1):
            continue
        command, rest = _command_of(words[1:])
        if command is None:
            wrong.append(" ".join(words))
        else:
            wrong += [f"{' '.join(words)}: {flag}" for flag in _flags_in(rest) - _flags_of(command)]
    assert not wrong


@every_page
def test_benchmarks_and_their_flags_exist(page: Page) -> None:
    wrong: list[str] = []
    for words in page.command_lines():
        where = words.index("benchmarks") if "benchmarks" in words else 0
        if words[max(0, where - 1) : where] != ["-m"] or len(words) == where + 1:
            continue
        name, *rest = words[where + 1 :]
        if name not in BENCHMARKS and not name.isupper():
            wrong.append(name)
        wrong += sorted(_flags_in(rest) - _script_flags())
    assert not wrong


def test_commands_of_the_measured_table_are_benchmarks() -> None:
    section = README.read_text().partition("## Measured\n")[2].partition("\n## ")[0]
    names = re.findall(r"\| \[(\w+)\]\(docs/measured/", section)
    assert names
    assert set(names) <= set(BENCHMARKS)


@every_page
def test_flags_named_alone_exist(page: Page) -> None:
    """A flag of any of our commands or scripts, or one that the page shows in a command of another program."""
    alone = {flag for span in page.spans() if span.startswith("-") for flag in _flags_in(span.split())}
    others = {flag for command in page.command_lines() if len(command) > 1 for flag in _flags_in(command[1:])}
    assert alone <= _all_flags() | _script_flags() | others


@every_page
def test_settings_exist(page: Page) -> None:
    named = [re.fullmatch(r"(?:config\.)?([a-z]+)\.([a-z_]+)(: .*)?", span) for span in page.spans()]
    settings = [(found[1], found[2]) for found in named if found and found[1] in _SECTIONS and found[2] != "md"]
    variables = re.findall(r"\bMOESAIC__([A-Z]+)__([A-Z_]+)", page.text)
    settings += [(section.lower(), key.lower()) for section, key in variables if section != "SECTION"]
    assert not [f"{section}.{key}" for section, key in settings if not _is_setting(section, key)]


@every_page
def test_configuration_examples_are_accepted(page: Page) -> None:
    for block in page.blocks("yaml"):
        tree = yaml.safe_load(block)
        tree = tree.get("config", tree)
        if set(tree) <= set(_SECTIONS):
            MoesaicConfig(**tree)


@every_page
def test_metrics_exist(page: Page) -> None:
    metrics = set(re.findall(r"`(moesaic_\w+)`", (DOCS / "metrics.md").read_text()))
    assert {span for span in page.spans() if re.fullmatch(r"moesaic_\w+", span)} - {"moesaic_"} <= metrics


@every_page
def test_routes_exist(page: Page) -> None:
    routes = set(re.findall(r"`((?:GET|POST) /\S*)`", (DOCS / "api.md").read_text()))
    assert {span for span in page.spans() if re.fullmatch(r"(GET|POST) /\S*", span)} <= routes


@every_page
def test_links_lead_somewhere(page: Page) -> None:
    broken: list[str] = []
    for link in page.links():
        if re.match(r"[a-z]+:", link):
            continue
        file, _, anchor = unquote(link).partition("#")
        target = (page.path.parent / file).resolve() if file else page.path
        if not target.exists() or (anchor and anchor not in Page(target).anchors()):
            broken.append(link)
    assert not broken


def _code_words(page: Page) -> list[str]:
    lines = [line for language in ("sh", "yaml") for block in page.blocks(language) for line in block.splitlines()]
    return [word.strip("`,;()\"'") for text in [*page.spans(), *lines] for word in text.split()]


def _is_path(word: str) -> bool:
    # Words in capitals stand for something: benchmarks/NAME.py.
    return bool(_PATH.match(word)) and "/" in word and not re.search(r"\b[A-Z]{3,}\b(?!\.md)", word)


@cache
def _python_files() -> set[str]:
    return {path.name for folder in _FOLDERS for path in (ROOT / folder).rglob("*.py")}


@cache
def _commands() -> dict[tuple[str, ...], click.Command]:
    """Every command by its words after `moesaic`."""
    found: dict[tuple[str, ...], click.Command] = {}

    def walk(command: click.Command, words: tuple[str, ...]) -> None:
        found[words] = command
        for name, inner in getattr(command, "commands", {}).items():
            walk(inner, (*words, name))

    walk(typer.main.get_command(app), ())
    return found


def _command_of(words: list[str]) -> tuple[click.Command | None, list[str]]:
    """The command that these words call, and the words after its name; None if there is none of that name."""
    length = max(count for count in range(len(words) + 1) if tuple(words[:count]) in _commands())
    command = _commands()[tuple(words[:length])]
    is_group = hasattr(command, "commands")
    if is_group and length < len(words) and not words[length].startswith("-"):
        return None, []
    return command, words[length:]


def _flags_in(words: list[str]) -> set[str]:
    return {word.partition("=")[0].rstrip(",;:") for word in words if re.match(r"--?[a-zA-Z]", word)}


def _flags_of(command: click.Command) -> set[str]:
    flags = {flag for parameter in command.params for flag in (*parameter.opts, *parameter.secondary_opts)}
    return flags | {"-h", "--help"}


@cache
def _all_flags() -> set[str]:
    return {flag for command in _commands().values() for flag in _flags_of(command)}


@cache
def _script_flags() -> set[str]:
    """Flags that benchmarks and scripts declare."""
    files = [path for folder in ("benchmarks", "deploy", "docs", "proto") for path in (ROOT / folder).rglob("*.py")]
    return {flag for path in files for flag in re.findall(r"\"(--[a-z][a-z-]*)\"", path.read_text())}


def _is_setting(section: str, key: str) -> bool:
    kind = _SECTIONS[section].annotation if section in _SECTIONS else None
    return kind is not None and key in kind.model_fields
