"""`moesaic config`: an example that a server accepts, and the configuration without its secrets."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from cluster.cli.main import app
from cluster.config.load import MoesaicConfig, load_config


def test_the_example_is_short_and_accepted(tmp_path: Path) -> None:
    text = CliRunner().invoke(app, ["config", "--example"]).stdout
    file = tmp_path / "moesaic.yaml"
    file.write_text(text)

    assert len(text.splitlines()) == 15 and text.count("#") >= 10
    assert load_config(file).attention.max_queue == 256


def test_what_is_printed_is_what_is_in_force_and_shows_no_secret(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOESAIC__FRONTEND__API_KEY", "k3y-of-clients")
    monkeypatch.setenv("MOESAIC__REDIS__URL", "redis://:p4ss@store:6379/3")
    monkeypatch.setenv("MOESAIC__ATTENTION__MAX_QUEUE", "7")

    text = CliRunner().invoke(app, ["config"]).stdout
    tree = yaml.safe_load(text)

    assert tree["attention"]["max_queue"] == 7 and list(tree) == list(MoesaicConfig.model_fields)
    assert tree["redis"]["url"].endswith("@store:6379/3")
    assert "p4ss" not in text and "k3y-of-clients" not in text
