"""`moesaic serve`: flags become configuration, progress has elapsed seconds, the exit code is passed on."""

from __future__ import annotations

import sys
import types
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import Result

from cluster.cli.serve import elapsed_reporter
from cluster.config.load import MoesaicConfig


def _install_app(monkeypatch: pytest.MonkeyPatch, code: int) -> list[MoesaicConfig]:
    seen: list[MoesaicConfig] = []

    def run_server(config: MoesaicConfig, on_progress: Callable[[str], None]) -> int:
        seen.append(config)
        on_progress("ready")
        return code

    module = types.ModuleType("cluster.app")
    module.run_server = run_server  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cluster.app", module)
    monkeypatch.setattr("cluster.cli.serve_checks.check_port_is_free", lambda _host, _port, **_options: None)
    return seen


def test_flags_reach_the_server(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _install_app(monkeypatch, 0)
    flags = ["--port", "8123", "--host", "0.0.0.0", "--expert-cache", "25%", "--kv-cache", "64MiB", "--threads", "1"]
    flags += ["--api-key", "k", "--max-queue", "3", "--redis-url", "redis://r:1/0", "--served-name", "n"]
    flags += ["--grpc-port", "8124", "--no-grpc"]
    flags += ["--dtype", "float32", "--max-model-len", "256", "--ray-address", "auto"]
    flags += ["--eviction", "fmoe", "--prediction", "next-gate", "--ram-tier", "50%", "--link-gb-per-s", "2.5"]
    flags += ["--policy-state", "learned.npz"]
    result = run("serve", "moesaic-demo", *flags)
    assert result.exit_code == 0, result.output
    (config,) = seen
    assert (config.frontend.host, config.frontend.port) == ("0.0.0.0", 8123)
    assert (config.grpc.port, config.grpc.enabled) == (8124, False)
    assert config.frontend.api_key is not None and config.frontend.api_key.get_secret_value() == "k"
    assert (config.experts.cache, config.attention.kv_cache) == ("25%", "64MiB")
    assert (config.experts.eviction, config.experts.prediction) == ("fmoe", "next-gate")
    assert (config.experts.ram_tier, config.experts.link_gb_per_s) == ("50%", 2.5)
    assert config.experts.policy_state == str(Path.cwd() / "learned.npz"), "workers are elsewhere"
    assert (config.attention.threads, config.attention.max_queue) == (1, 3)
    assert (config.redis.url, config.ray.address) == ("redis://r:1/0", "auto")
    assert (config.model.served_name, config.model.dtype, config.model.max_model_len) == ("n", "float32", 256)
    assert "s] ready" in result.stdout


def test_defaults_and_exit_code(run: Callable[..., Result], monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _install_app(monkeypatch, 3)
    assert run("serve").exit_code == 3
    assert seen == [MoesaicConfig()]


def test_elapsed_seconds(capsys: pytest.CaptureFixture[str]) -> None:
    times = iter([10.0, 12.5])
    elapsed_reporter(lambda: next(times))("loading")
    assert capsys.readouterr().out == "[   2.5 s] loading\n"
