"""The script of `helm test`, against a real server."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from live_server import LiveServer, free_port

pytestmark = pytest.mark.ray

SCRIPT = Path(__file__).parents[2] / "helm" / "moesaic" / "files" / "check.py"


def _check(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, str(SCRIPT), *arguments], capture_output=True, text=True, timeout=120)


def test_the_check_passes_on_a_server_and_fails_where_grpc_does_not_answer(server: LiveServer) -> None:
    passed = _check(server.url, f"127.0.0.1:{server.grpc_port}")
    assert passed.returncode == 0, passed.stderr
    assert "moesaic-demo" in passed.stdout and "4 tokens" in passed.stdout and "serving" in passed.stdout
    assert _check(server.url, f"127.0.0.1:{free_port()}").returncode != 0
