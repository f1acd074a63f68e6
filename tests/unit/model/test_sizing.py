"""What `moesaic fit` says: published parameter counts, what to set, and why not."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest
from typer.testing import CliRunner

from actors.model.shape import read_shape
from cluster.cli.main import app
from cluster.model.info import read_sizes
from cluster.model.sizing import Machines, ModelShape, fit

ROOT = Path(__file__).resolve().parents[3]
CONFIGS = ROOT / "tests" / "data" / "configs"
GIB = 2**30


def _shape(name: str) -> ModelShape:
    return read_shape(read_sizes(str(CONFIGS / name)), "auto")


def _script(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"docs_{name}", ROOT / "docs" / f"{name}.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("name", "parameters"), [("Mixtral-8x7B-v0.1", 46_702_792_704), ("Qwen3-30B-A3B", 30_532_122_624)]
)
def test_bytes_from_config_alone_are_those_of_the_published_parameters(name: str, parameters: int) -> None:
    shape = _shape(name)

    assert (shape.dense_bytes + shape.all_experts_bytes) / 2 == parameters


def test_what_does_not_fit_on_a_host_is_named_with_the_share_to_set() -> None:
    shape = _shape("Mixtral-8x7B-v0.1")
    sizing = fit(shape, Machines(nodes=2, node_bytes=64 * GIB, workers=1, hosts=2))

    settings = dict(sizing.settings)
    percent = int(settings["experts.host_cache"].rstrip("%"))
    assert sizing.fits and sizing.resident_share < 1
    assert percent * shape.all_experts_bytes // 100 <= sizing.host_bytes
    assert sizing.planned_bytes <= sizing.usable_bytes < sizing.needed_bytes


def test_enough_memory_needs_no_setting_but_the_hosts() -> None:
    sizing = fit(_shape("Qwen3-30B-A3B"), Machines(nodes=2, node_bytes=64 * GIB, workers=1, hosts=2))

    assert sizing.settings == (("experts.hosts", "2"),)
    assert sizing.resident_share == 1


def test_the_way_out_of_too_little_memory_is_enough() -> None:
    shape = _shape("Qwen3-30B-A3B")
    sizing = fit(shape, Machines(nodes=1, node_bytes=4 * GIB))
    assert sizing.problem is not None
    named = int(sizing.problem.split("--memory ")[1].split("GiB")[0])

    assert not sizing.fits
    assert fit(shape, Machines(nodes=1, node_bytes=named * GIB)).fits


def test_the_command_prints_one_json_document_and_ends_with_1_where_it_does_not_fit() -> None:
    folder = str(CONFIGS / "Qwen3-30B-A3B")
    good = CliRunner().invoke(app, ["fit", folder, "--nodes", "2", "--memory", "64GiB", "--json"])
    bad = CliRunner().invoke(app, ["fit", folder, "--memory", "4GiB"])

    assert json.loads(good.stdout)["sizing"]["fits"] is True
    assert (good.exit_code, bad.exit_code) == (0, 1)
    assert "does not fit" in bad.stdout


def test_the_page_of_worked_examples_is_what_the_command_says() -> None:
    sizing = _script("sizing")

    assert sizing.PAGE.read_text() == sizing.page(), "run python docs/sizing.py"
