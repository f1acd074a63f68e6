"""What tells one deployment from another, for every actor that outlives one."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
from model_builders import DEMO

from actors.ray_shells.named_actors import ActorName
from cluster.config.load import from_tree, load_config, to_tree
from cluster.deployed_spec import DeployedSpec, specify
from cluster.errors import CheckpointError, ConfigError

_HOST = ("attention", "experts", "scheduler")


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return shutil.copytree(DEMO, tmp_path / "model")


def _spec(path: Path, /, **sections: dict[str, Any]) -> DeployedSpec:
    tree = {"model": {"path": str(path)} | sections.pop("model", {})} | sections
    return specify(load_config(None, tree), None)


@pytest.mark.parametrize(
    ("section", "field", "value"),
    [
        ("model", "dtype", "bfloat16"),
        ("model", "max_model_len", 64),
        ("experts", "cache", "25%"),
        ("experts", "host_cache", "50%"),
        ("experts", "ram_tier", "10%"),
        ("experts", "remote_tier", "10%"),
        ("experts", "io_threads", 7),
        ("experts", "direct_io", "never"),
        ("experts", "hosts", 2),
        ("experts", "carrier", "grpc"),
        ("attention", "threads", 3),
        ("scheduler", "report_interval_s", 2.0),
        ("ray", "host_resources", {"place": 1.0}),
    ],
)
def test_whatever_a_host_reads_makes_another_one(model: Path, section: str, field: str, value: object) -> None:
    assert _spec(model).digest(*_HOST) != _spec(model, **{section: {field: value}}).digest(*_HOST)


def test_what_it_does_not_read_leaves_it_where_it_is(model: Path) -> None:
    first, second = _spec(model), _spec(model, frontend={"api_key": "secret"}, grpc={"port": 50099})
    assert first.digest(*_HOST) == second.digest(*_HOST)
    assert first.digest(*_HOST, "frontend", "grpc") != second.digest(*_HOST, "frontend", "grpc")
    assert first.digest(place="a") != first.digest(place="b")


def test_another_path_with_the_same_files_is_another_deployment(model: Path, tmp_path: Path) -> None:
    copy = shutil.copytree(model, tmp_path / "copy")
    assert _spec(model).fingerprint == _spec(copy).fingerprint
    assert _spec(model).digest() != _spec(copy).digest()


def test_a_new_revision_in_the_same_folder_is_another_deployment(model: Path) -> None:
    before = _spec(model)
    (model / "chat_template.jinja").write_text("{{ messages }}")
    texts = _spec(model)
    assert texts.digest() == before.digest()
    assert texts.digest(texts=True) != before.digest(texts=True)
    _revise(model)
    assert _spec(model).digest() != before.digest()


def test_a_process_that_starts_after_the_files_changed_says_so(model: Path) -> None:
    spec = _spec(model)
    assert spec.read_model().fingerprint == spec.fingerprint
    _revise(model)
    with pytest.raises(CheckpointError, match=rf"{spec.fingerprint}.*deploy again"):
        spec.read_model()


def test_secrets_do_not_show_in_a_digest_and_the_tree_survives_the_way(model: Path) -> None:
    spec = _spec(model, frontend={"api_key": "secret"})
    assert to_tree(spec.config) == spec.config_tree
    assert spec.config.frontend.api_key is not None
    assert "secret" not in spec.digest("frontend")


@pytest.mark.parametrize("name", ["Upper", "a/b", "a@b", "", "-a", "a" * 64, "a b"])
def test_an_application_has_a_name_that_can_be_part_of_others(name: str) -> None:
    with pytest.raises(ConfigError, match=r"ray\.application"):
        from_tree({"ray": {"application": name}})


def test_a_name_of_an_actor_says_whose_it_is() -> None:
    name = ActorName("two", "expert-host", "0", "abc")
    assert ActorName.parse(str(name)) == name
    for other in ("two", "SERVE_CONTROLLER_ACTOR", "a/b/c@d", "a/scheduler/@d@e", "a/scheduler/x/y@d", "a/scheduler/"):
        assert ActorName.parse(other) is None, other


def _revise(model: Path) -> None:
    weights = model / "model.safetensors"
    data = bytearray(weights.read_bytes())
    middle = len(data) // 2
    data[middle : middle + len(data) // 4] = bytes(len(data) // 4)
    weights.write_bytes(data)
