"""Unit tests reach nothing outside their process: no network, not even loopback, and no Ray."""

from __future__ import annotations

import socket
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import pytest

_UNREACHABLE = "a unit test may not {}: fake it, mark it `sockets` if sockets are what it is about, or move it"


@pytest.fixture(autouse=True)
def nothing_outside(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Internet sockets, gRPC and `ray.init` fail the test; pairs and pipes within the process are none of these."""
    if request.node.get_closest_marker("sockets") is None:
        for name in ("bind", "connect", "connect_ex"):
            monkeypatch.setattr(socket.socket, name, _only_local(getattr(socket.socket, name), name))
        for module, names in (("grpc", ("insecure_channel", "server")), ("grpc.aio", ("insecure_channel", "server"))):
            for name in names if module in sys.modules else ():
                monkeypatch.setattr(f"{module}.{name}", _refuse(f"use {module}.{name}"))
    if "ray" in sys.modules:
        monkeypatch.setattr("ray.init", _refuse("start Ray"))
    yield
    assert not (ray := sys.modules.get("ray")) or not ray.is_initialized(), _UNREACHABLE.format("start Ray")


def _refuse(deed: str) -> Callable[..., NoReturn]:
    def refuse(*_: Any, **__: Any) -> NoReturn:
        pytest.fail(_UNREACHABLE.format(deed))

    return refuse


def _only_local(method: Callable[..., Any], name: str) -> Callable[..., Any]:
    def call(self: socket.socket, *arguments: Any) -> Any:
        if self.family in (socket.AF_INET, socket.AF_INET6):
            _refuse(f"{name} a socket")()
        return method(self, *arguments)

    return call
