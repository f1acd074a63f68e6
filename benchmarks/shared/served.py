"""A `moesaic serve` of a benchmark: started, waited for, ended."""

from __future__ import annotations

import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

_READY_TIMEOUT_S, _STOP_TIMEOUT_S = 180.0, 60.0


@contextmanager
def served(*arguments: str | Path) -> Iterator[tuple[str, float]]:
    """Its address and the seconds until it was ready. Args: those of `moesaic serve`; ports are chosen here."""
    port = free_port()
    ports = ("--port", str(port), "--grpc-port", str(free_port()))
    began_s = time.monotonic()
    command = [Path(sys.executable).with_name("moesaic"), "serve", *arguments, *ports]
    server = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_ready(server, url)
        yield url, time.monotonic() - began_s
    finally:
        server.terminate()
        server.wait(_STOP_TIMEOUT_S)


def _wait_ready(server: subprocess.Popen[bytes], url: str) -> None:
    end_s = time.monotonic() + _READY_TIMEOUT_S
    while time.monotonic() < end_s:
        if server.poll() is not None:
            raise SystemExit(f"the server ended with code {server.returncode} before it was ready")
        try:
            if httpx.get(f"{url}/ready", timeout=2).status_code == 200:
                return
        except httpx.HTTPError:
            pass
        time.sleep(0.1)
    raise SystemExit(f"not ready after {_READY_TIMEOUT_S:.0f} s")


def free_port() -> int:
    """A TCP port of this machine that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
