"""Flags that set fields of the configuration: their fields exist, and commands show them in one order."""

from __future__ import annotations

from pathlib import Path

import pytest
import typer

from cluster.cli.main import app
from cluster.cli.settings import ENGINE, SETTINGS, overrides
from cluster.config.load import MoesaicConfig

COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", [name for name, setting in SETTINGS.items() if setting.key])
def test_the_field_exists(name: str) -> None:
    section, _, field = SETTINGS[name].key.partition(".")
    assert field in MoesaicConfig.model_fields[section].annotation.model_fields  # type: ignore[union-attr]


@pytest.mark.parametrize(("command", "names"), [("serve", tuple(SETTINGS)), ("generate", ENGINE), ("chat", ENGINE)])
def test_commands_have_them_in_order(command: str, names: tuple[str, ...]) -> None:
    shown = [each.name for each in COMMANDS[command].params if each.name in SETTINGS and each.name in names]
    assert shown == list(names)


def test_files_are_named_so_that_other_processes_find_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert overrides({"policy_state": Path("state")}) == {"experts": {"policy_state": str(tmp_path / "state")}}
