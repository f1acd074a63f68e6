"""A wrong configuration: everything that is wrong at once, each by its path, with the nearest name and no secret."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

import pytest

from cluster.config.check import impossible_settings
from cluster.config.load import MoesaicConfig, load_config
from cluster.config.renamed import RENAMED_KEYS
from cluster.errors import ConfigError


def _problems(overrides: dict[str, dict[str, Any]] | None = None, path: Path | None = None) -> tuple[str, ...]:
    with pytest.raises(ConfigError) as raised:
        load_config(path, overrides)
    return raised.value.problems


def _file(tmp_path: Path, text: str | bytes) -> Path:
    path = tmp_path / "config.yaml"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def test_all_problems_of_all_sources_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = _file(tmp_path, "experts:\n  evicton: lru\n  hosts: -1\ngprc: {}\nfrontend:\n  port: 99999\n")
    monkeypatch.setenv("MOESAIC__ATTENTION__WORKERS", "none")
    monkeypatch.setenv("MOESAIC__MODLE__PATH", "x")
    problems = _problems({"attention": {"kv_cache": "lots"}}, path)
    expected = ["experts.evicton", "experts.hosts", "gprc", "frontend.port", "attention.workers", "MODLE", "kv_cache"]
    for name in expected:
        assert sum(name in problem for problem in problems) == 1, name
    assert len(problems) == len(expected)


@pytest.mark.parametrize(
    ("section", "key", "nearest"),
    [
        ("experts", "cash", "experts.cache"),
        ("experts", "evicton", "experts.eviction"),
        ("experts", "host-cache", "experts.host_cache"),
        ("frontend", "prot", "frontend.port"),
        ("frontend", "max_batch_tokens", "attention.max_batch_tokens"),
        ("grpc", "tls_certificate", "grpc.tls_cert"),
    ],
)
def test_the_nearest_field_is_named(section: str, key: str, nearest: str) -> None:
    (problem,) = _problems({section: {key: 1}})
    assert f"{section}.{key}" in problem and f"did you mean {nearest}?" in problem


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
@pytest.mark.parametrize("source", ["file", "environment", "override"])
def test_an_old_key_is_refused_with_the_new_one(
    source: str, old: str, new: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section, _, field = old.partition(".")
    path = _file(tmp_path, f"{section}:\n  {field}: 1\n") if source == "file" else None
    if source == "environment":
        monkeypatch.setenv(f"MOESAIC__{section}__{field}".upper(), "1")
    (problem,) = _problems({section: {field: 1}} if source == "override" else None, path)
    assert problem == f"config field {old}: it is called {new} now"


@pytest.mark.parametrize(("old", "new"), RENAMED_KEYS.items())
def test_a_renamed_key_exists_under_its_new_name_only(old: str, new: str) -> None:
    tree = MoesaicConfig().model_dump()
    assert _has(tree, new) and not _has(tree, old)


def _has(tree: dict[str, Any], key: str) -> bool:
    section, _, field = key.partition(".")
    return field in tree[section]


def test_a_name_like_no_other_has_no_guess() -> None:
    (problem,) = _problems({"experts": {"zzzzzz": 1}})
    assert "experts.zzzzzz" in problem and "did you mean" not in problem


@pytest.mark.parametrize(
    "text",
    ["experts: [", "a: b: c", "- one\n- two\n", "just words", b"\xff\xfe\x00", "experts:\n\tcache: 1\n"],
)
def test_a_file_that_is_no_configuration(tmp_path: Path, text: str | bytes) -> None:
    path = _file(tmp_path, text)
    (problem,) = _problems(path=path)
    assert str(path) in problem


def test_an_empty_section_is_as_left_out(tmp_path: Path) -> None:
    assert load_config(_file(tmp_path, "experts:\nmodel:\n  path: m\n")).model.path == "m"


def test_no_secret_is_shown() -> None:
    for section, field in (("frontend", "api_key"), ("redis", "url")):
        (problem,) = _problems({section: {field: ["hunter2"]}})
        assert f"{section}.{field}" in problem and "hunter2" not in problem


def test_problems_cross_processes() -> None:
    error = ConfigError.of(["one", "two"])
    assert pickle.loads(pickle.dumps(error)).problems == ("one", "two")
    assert ConfigError("alone").problems == ("alone",)


@pytest.mark.parametrize("field", ["cache", "host_cache", "ram_tier", "remote_tier"])
@pytest.mark.parametrize("setting", ["900%", "100.1%", "much", "-1", ""])
def test_sizes_that_cannot_be(field: str, setting: str) -> None:
    (problem,) = _problems({"experts": {field: setting}})
    assert f"experts.{field}" in problem


@pytest.mark.parametrize(
    ("tree", "fields"),
    [
        ({"grpc": {"port": 8000}}, ("frontend.port", "grpc.port")),
        ({"experts": {"max_hosts": 4}}, ("experts.max_hosts", "experts.hosts")),
        (
            {"experts": {"hosts": 1, "max_hosts": 4}, "scheduler": {"placement": "fixed"}},
            ("experts.max_hosts", "scheduler.placement"),
        ),
    ],
)
def test_what_cannot_work_together(tree: dict[str, dict[str, Any]], fields: tuple[str, ...]) -> None:
    (problem,) = impossible_settings(load_config(None, tree))
    for field in fields:
        assert field in problem


@pytest.mark.parametrize(
    "tree",
    [
        {},
        {"grpc": {"port": 8000, "enabled": False}},
        {"experts": {"hosts": 2, "max_hosts": 4}},
        {"experts": {"hosts": 2, "max_hosts": 2}, "scheduler": {"placement": "fixed"}},
    ],
)
def test_what_can(tree: dict[str, dict[str, Any]]) -> None:
    assert impossible_settings(load_config(None, tree)) == []


@pytest.mark.parametrize(
    ("section", "low", "high"), [("attention", "max_workers", "workers"), ("experts", "max_hosts", "hosts")]
)
def test_a_maximum_below_the_number(section: str, low: str, high: str) -> None:
    (problem,) = _problems({section: {low: 1, high: 2}})
    assert section in problem and low in problem and high in problem
