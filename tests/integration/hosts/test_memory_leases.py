"""An engine and an expert host promise what they will fill, where the node's other processes see it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from damaged_checkpoints import truncated

from actors.attention.build import build_engine
from actors.expert_host.build import build_host_backend
from cluster.config.load import load_config
from cluster.config.sizes import parse_size
from cluster.errors import ConfigError
from cluster.model.info import load_model_info

pytestmark = pytest.mark.slow


def promised(directory: Path) -> list[dict[str, int]]:
    return [json.loads(path.read_text())["promised"] for path in directory.glob("*.lease")]


def test_budgets_of_both_kinds_are_promised_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.node_memory.leases.lease_directory", lambda: tmp_path)
    info = load_model_info("moesaic-demo")
    experts = {"cache": "50%", "ram_tier": "60%"}
    parts = build_engine(load_config(None, {"experts": experts, "attention": {"kv_cache": "16MiB"}}), info, threads=1)
    model_bytes = parts.store.model_bytes
    [of_engine] = promised(tmp_path)

    assert of_engine["experts.cache"] == parts.store.budget_bytes == model_bytes // 2
    assert of_engine["experts.ram_tier"] == model_bytes * 6 // 10
    assert parse_size("15MiB") < of_engine["attention.kv_cache"] <= parse_size("16MiB")

    parts.dispatcher.close()
    parts.lease.close()
    host = build_host_backend(load_config(None, {"experts": {"hosts": 1}}), info, 0, threads=1)
    [of_host] = promised(tmp_path)

    assert of_host["experts.host_cache"] == host.backend.store.budget_bytes > 0
    host.backend.store.close()
    host.lease.close()
    assert not promised(tmp_path)


def test_nothing_stays_promised_by_one_that_could_not_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.node_memory.leases.lease_directory", lambda: tmp_path)
    config = load_config(None, {"experts": {"cache": "1"}, "attention": {"kv_cache": "16MiB"}})

    with pytest.raises(Exception, match="minimum"):
        build_engine(config, load_model_info("moesaic-demo"), threads=1)

    assert not promised(tmp_path)


def test_a_kv_cache_that_is_too_small_is_found_before_weights(tmp_path: Path) -> None:
    """The weights are damaged: reading them would say so instead."""
    path = truncated(tmp_path / "m")
    config = load_config(None, {"attention": {"kv_cache": "1MiB"}, "model": {"path": str(path)}})
    with pytest.raises(ConfigError, match=r"attention\.kv_cache.*2048 tokens"):
        build_engine(config, load_model_info(str(path)), threads=1)
