"""Damaged checkpoints, and budgets that cannot work: one clear error with file and tensor, before anything starts."""

from __future__ import annotations

from pathlib import Path

import pytest
from damaged_checkpoints import (
    linked_demo,
    truncated,
    with_config,
    with_hole,
    with_missing_shard,
    with_shape,
    without_tensor,
)
from typer.testing import CliRunner

from actors.attention.build import build_engine
from cluster.cli.main import app
from cluster.config.load import from_tree
from cluster.errors import CheckpointError, ConfigError
from cluster.model.info import load_model_info

pytestmark = pytest.mark.slow  # transformers' models take seconds to import

EXPERT = "model.layers.3.mlp.experts.5.up_proj.weight"
DENSE = "model.layers.2.self_attn.k_proj.weight"


def _refused_at_once(monkeypatch: pytest.MonkeyPatch, model: Path) -> str:
    """The one line of `moesaic serve`, which must not come as far as starting Ray."""
    monkeypatch.setattr("cluster.app.run_server", lambda *_: pytest.fail("the server was started"))
    monkeypatch.setattr("cluster.cli.serve_checks._check_ports", lambda *_: None)
    result = CliRunner().invoke(app, ["serve", str(model)])
    assert result.exit_code == 2, result.output
    (line,) = result.stderr.strip().splitlines()
    return line


def _refused_by_engine(model: Path, **experts: str) -> str:
    config = from_tree({"model": {"path": str(model)}, "experts": experts})
    with pytest.raises(ConfigError) as raised:
        build_engine(config, load_model_info(str(model)), threads=1)
    assert isinstance(raised.value, CheckpointError) or experts
    return raised.value.message


def test_truncated_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = _refused_at_once(monkeypatch, truncated(tmp_path / "m"))

    assert str(tmp_path / "m" / "model.safetensors") in line
    assert "truncated: tensor model." in line


def test_missing_shard(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    shard = "model-00002-of-00002.safetensors"
    line = _refused_at_once(monkeypatch, with_missing_shard(tmp_path / "m", EXPERT, shard))

    assert str(tmp_path / "m" / shard) in line
    assert EXPERT in line


def test_missing_weights(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = _refused_at_once(monkeypatch, linked_demo(tmp_path / "m", without="model.safetensors"))

    assert str(tmp_path / "m" / "model.safetensors") in line


def test_missing_tokenizer(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = _refused_at_once(monkeypatch, linked_demo(tmp_path / "m", without="tokenizer.json"))

    assert str(tmp_path / "m" / "tokenizer.json") in line


def test_missing_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    line = _refused_at_once(monkeypatch, linked_demo(tmp_path / "m", without="config.json"))

    assert str(tmp_path / "m" / "config.json") in line


@pytest.mark.parametrize("tensor", [EXPERT, DENSE])
def test_tensor_of_wrong_shape(tmp_path: Path, tensor: str) -> None:
    shape = {EXPERT: [256, 64], DENSE: [256, 128]}[tensor]
    message = _refused_by_engine(with_shape(tmp_path / "m", tensor, shape))

    assert str(tmp_path / "m" / "model.safetensors") in message
    assert tensor in message
    assert str(tuple(shape)) in message and str(tuple(reversed(shape))) in message


@pytest.mark.parametrize(
    ("tensor", "named"), [(EXPERT, "no up matrix for expert 5 of model.layers.3.mlp.experts"), (DENSE, DENSE)]
)
def test_missing_tensor(tmp_path: Path, tensor: str, named: str) -> None:
    message = _refused_by_engine(without_tensor(tmp_path / "m", tensor))

    assert str(tmp_path / "m") in message
    assert named in message


def test_weights_that_the_format_forbids(tmp_path: Path) -> None:
    message = _refused_by_engine(with_hole(tmp_path / "m", DENSE))

    assert str(tmp_path / "m" / "model.safetensors") in message


def test_config_with_values_of_wrong_type(tmp_path: Path) -> None:
    message = _refused_by_engine(with_config(tmp_path / "m", hidden_size="wide"))

    assert str(tmp_path / "m" / "config.json") in message
    assert "hidden_size" in message


def test_config_without_experts(tmp_path: Path) -> None:
    message = _refused_by_engine(with_config(tmp_path / "m", model_type="qwen3", architectures=["Qwen3ForCausalLM"]))

    assert str(tmp_path / "m" / "config.json") in message
    assert "no routed experts" in message


def test_family_that_transformers_does_not_know(tmp_path: Path) -> None:
    message = _refused_by_engine(with_config(tmp_path / "m", model_type="nosuch_moe"))

    assert str(tmp_path / "m" / "config.json") in message
    assert "nosuch_moe" in message


def test_expert_cache_below_the_minimum_says_the_minimum(tmp_path: Path) -> None:
    message = _refused_by_engine(linked_demo(tmp_path / "m", without=""), cache="256KiB")

    assert "experts.cache" in message
    assert str(4 * 3 * 64 * 256 * 2) in message, "the four active experts' bytes"
