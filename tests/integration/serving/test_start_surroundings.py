"""Real starts in surroundings that have nothing to do with serving: none of them may stop one.

One start has them all at once and runs always; each alone, and IPv6's other address, at night.
"""

from __future__ import annotations

import os
import shutil
import socket
from pathlib import Path
from typing import Any

import grpc
import httpx
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from live_server import LiveServer, poll, running_server

pytestmark = pytest.mark.ray

_USER = 12345  # the system has no name for it, as OpenShift's
_SHADOWS = ("cluster", "actors", "redis", "types", "torch", "ray", "json", "secrets")
_PROXIES = dict.fromkeys(("HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY", "grpc_proxy"), "http://127.0.0.1:9")

needs_root = pytest.mark.skipif(os.getuid() != 0 or not shutil.which("setpriv"), reason="needs root and setpriv")
needs_ipv6 = pytest.mark.skipif(not socket.has_ipv6 or not Path("/proc/net/if_inet6").exists(), reason="needs IPv6")


def _shadow(root: Path) -> None:
    """Modules of the user's own, with names that ours and the libraries' have too."""
    for name in _SHADOWS:
        (root / f"{name}.py").write_text(f"raise SystemExit('{name}.py of the working directory was imported')\n")


def _give(root: Path) -> None:
    os.chown(root, _USER, _USER)


def _as_nobody() -> list[str]:
    """It may read what root may, so that it finds this interpreter, and write only what is its own."""
    capability = "+dac_read_search"
    ids = ["--reuid", str(_USER), "--regid", str(_USER), "--clear-groups"]
    return [
        "setpriv",
        *ids,
        "--inh-caps",
        capability,
        "--ambient-caps",
        capability,
        "env",
        "-u",
        "USER",
        "-u",
        "LOGNAME",
    ]


def _assert_serves(server: LiveServer) -> None:
    """HTTP with tokens from a worker and its expert host, gRPC, and what is printed."""
    body = {"prompt": "Once upon a time", "max_tokens": 8}
    with httpx.Client(trust_env=False, timeout=60) as client:
        answer = client.post(f"{server.url}/v1/completions", json=body).raise_for_status()
        assert answer.json()["choices"][0]["text"]
        assert client.get(f"{server.url}/status").json()["workers"][0]["degraded"] == []
    address = f"{server.host}:{server.grpc_port}"
    with grpc.insecure_channel(address, options=[("grpc.enable_http_proxy", 0)]) as channel:
        stub = health_pb2_grpc.HealthStub(channel)
        request = health_pb2.HealthCheckRequest(service="moesaic.v1.GenerationService")
        serving = health_pb2.HealthCheckResponse.SERVING
        poll(lambda: stub.Check(request, timeout=20).status == serving, deadline_s=30, what="SERVING over gRPC")
    words = (f"{server.url}/v1", address)
    # The command may look a moment later than we did.
    poll(lambda: all(word in (server.root / "log").read_text() for word in words), deadline_s=30, what="addresses")


@needs_root
@needs_ipv6
def test_everything_at_once() -> None:
    """A nameless user without a home, modules in the way, proxies that lead nowhere, IPv6."""

    def prepare(root: Path) -> None:
        _shadow(root)
        _give(root)

    options: dict[str, Any] = {"prefix": _as_nobody(), "prepare": prepare, "host": "[::1]", "HOME": "/", **_PROXIES}
    with running_server("--host", "::1", "--expert-hosts", "1", "--threads", "1", **options) as server:
        _assert_serves(server)


@pytest.mark.nightly
def test_modules_in_the_working_directory() -> None:
    with running_server("--threads", "1", prepare=_shadow) as server:
        _assert_serves(server)


@pytest.mark.nightly
@needs_root
@pytest.mark.parametrize("home", ["/", "/nosuch", "/proc"])
def test_a_user_without_name_or_home(home: str) -> None:
    with running_server("--threads", "1", prefix=_as_nobody(), prepare=_give, HOME=home) as server:
        _assert_serves(server)


@pytest.mark.nightly
def test_a_home_that_cannot_be_written() -> None:
    with running_server("--threads", "1", HOME="/proc") as server:
        _assert_serves(server)


@pytest.mark.nightly
def test_proxies_that_lead_nowhere() -> None:
    with running_server("--threads", "1", "--expert-hosts", "1", **_PROXIES) as server:
        _assert_serves(server)


@pytest.mark.nightly
@needs_ipv6
@pytest.mark.parametrize("host", ["::1", "::"])
def test_ipv6(host: str) -> None:
    with running_server("--host", host, "--threads", "1", host="[::1]") as server:
        body = {"prompt": "Once upon a time", "max_tokens": 8}
        httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        assert f"{server.url}/v1" in (server.root / "log").read_text()
