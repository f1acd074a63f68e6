"""How Ray is started: which cluster, and only if none is named."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from live_server import clean_environment, end_all, make_root

from actors.ray_shells.runtime import RayRuntime
from cluster.application import ApplicationId
from cluster.errors import ConfigError, Unavailable

pytestmark = pytest.mark.slow  # Ray Serve takes seconds to import


@pytest.fixture(autouse=True)
def temporary(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path_factory.mktemp("temporary")))


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    calls: list[dict[str, Any]] = []
    for name in ("RAY_AUTH_MODE", "RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH"):
        monkeypatch.setenv(name, "")  # so that it is put back afterwards
        monkeypatch.delenv(name)
    monkeypatch.setattr("ray.init", lambda **options: calls.append(options))
    return calls


def test_a_ray_of_our_own_never_joins_one_found_on_the_machine(started: list[dict[str, Any]]) -> None:
    RayRuntime(address=None, application=ApplicationId("n", "a"), environment={})

    assert started[0]["address"] == "local"


def test_a_named_cluster_is_joined_without_options_of_its_own_start(started: list[dict[str, Any]]) -> None:
    RayRuntime(address="10.0.0.1:6379", application=ApplicationId("n", "a"), environment={})

    assert started[0]["address"] == "10.0.0.1:6379"
    assert "object_store_memory" not in started[0]


@pytest.mark.parametrize(
    ("set_before", "expected"),
    [
        ({}, {"RAY_AUTH_TOKEN": "new"}),
        ({"RAY_AUTH_MODE": "token"}, {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "new"}),
        ({"RAY_AUTH_MODE": "disabled"}, {"RAY_AUTH_MODE": "disabled"}),
        ({"RAY_AUTH_TOKEN": "mine"}, {"RAY_AUTH_TOKEN": "mine"}),
        ({"RAY_AUTH_TOKEN_PATH": "/mine"}, {"RAY_AUTH_TOKEN_PATH": "/mine"}),
    ],
)
def test_a_ray_of_our_own_has_a_token_that_no_file_holds(
    started: list[dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
    set_before: dict[str, str],
    expected: dict[str, str],
) -> None:
    for name, value in set_before.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("secrets.token_hex", lambda _: "new")

    RayRuntime(address=None, application=ApplicationId("n", "a"), environment={})

    assert {name: value for name, value in os.environ.items() if name.startswith("RAY_AUTH")} == expected


_RUN_A_TASK = """
import ray
from actors.ray_shells.runtime import RayRuntime
from cluster.application import ApplicationId
RayRuntime(address=None, application=ApplicationId("n", "a"), environment={})
print(ray.get(ray.remote(lambda: "it runs").remote()))
"""


@pytest.mark.ray
def test_a_ray_of_our_own_leaves_no_token_in_the_home_by_which_the_next_one_would_ask_for_it(tmp_path: Path) -> None:
    root = make_root()
    try:
        environment = clean_environment(RAY_TMPDIR=str(root), HOME=str(tmp_path))
        command = [sys.executable, "-c", _RUN_A_TASK]
        run = subprocess.run(command, cwd=root, env=environment, capture_output=True, text=True, timeout=240)
        assert run.stdout.splitlines()[-1:] == ["it runs"], run.stderr
        assert not (tmp_path / ".ray" / "auth_token").exists()
    finally:
        end_all(root)
        shutil.rmtree(root, ignore_errors=True)


def test_modules_of_the_working_directory_reach_no_worker(
    started: list[dict[str, Any]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """Ray sends the driver's working directory to all workers as the first place to import from."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "redis.py").touch()
    seen: list[Path] = []
    monkeypatch.setattr("ray.init", lambda **_: seen.append(Path.cwd()))
    RayRuntime(address=None, application=ApplicationId("n", "a"), environment={})

    assert Path.cwd() == tmp_path
    assert seen[0] != tmp_path
    assert not any(seen[0].iterdir()) and seen[0].stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("error", [ConnectionError, RuntimeError, ValueError, OSError])
def test_ray_that_cannot_be_joined_is_one_line(monkeypatch: pytest.MonkeyPatch, error: type[Exception]) -> None:
    def fail(**_: object) -> None:
        raise error("no GCS there\nand a page of advice")

    monkeypatch.setattr("ray.init", fail)
    with pytest.raises(ConfigError, match=r"ray\.address.*10\.0\.0\.1.*no GCS there") as raised:
        RayRuntime(address="10.0.0.1:6379", application=ApplicationId("n", "a"), environment={})
    assert "advice" not in raised.value.message
    with pytest.raises(Unavailable, match="does not start"):
        RayRuntime(address=None, application=ApplicationId("n", "a"), environment={})
