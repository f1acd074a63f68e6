"""Every `StateStore` there is: in memory, and on real servers of each kind that this machine has."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from channel_checks import carrier, channel, host  # noqa: F401

from cluster.protocols import StateStore
from cluster.stats.embedded_valkey import EmbeddedValkey, find_server_binary, start_embedded_valkey
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.memory_store import MemoryStore
from cluster.stats.redis_store import RedisStore


@pytest.fixture(scope="session")
def valkey(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """The server that Moesaic brings along."""
    server = start_embedded_valkey(tmp_path_factory.mktemp("valkey"))
    yield server
    server.stop()


@pytest.fixture(scope="session")
def redis_7_0(tmp_path_factory: pytest.TempPathFactory) -> Iterator[EmbeddedValkey]:
    """Debian's Redis, the oldest one that is promised to work."""
    server = start_embedded_valkey(tmp_path_factory.mktemp("redis"), binary=_redis_7_0())
    yield server
    server.stop()


@pytest.fixture(params=["memory", "valkey", "redis_7_0", "fallback"])
def store(request: pytest.FixtureRequest) -> StateStore:
    if request.param == "memory":
        return MemoryStore()
    server: EmbeddedValkey = request.getfixturevalue("valkey" if request.param == "fallback" else request.param)
    primary = RedisStore(server.url)
    return FallbackStore(primary) if request.param == "fallback" else primary


@pytest.fixture(params=["valkey", "redis_7_0"])
def start_server(request: pytest.FixtureRequest) -> Iterator[Callable[[Path, int], EmbeddedValkey]]:
    """Starts servers for tests that end them; what is left is ended afterwards."""
    binary = find_server_binary() if request.param == "valkey" else _redis_7_0()
    started: list[EmbeddedValkey] = []

    def start(folder: Path, port: int = 0) -> EmbeddedValkey:
        started.append(start_embedded_valkey(folder, port, binary=binary))
        return started[-1]

    yield start
    for server in started:
        server.stop()


@pytest.fixture
def fingerprint(request: pytest.FixtureRequest) -> str:
    return request.node.name


def _redis_7_0() -> Path:
    found = shutil.which("redis-server")
    if found is None:
        pytest.skip("no redis-server on the PATH; `apt-get install redis-server` on Debian 12")
    version = subprocess.run([found, "--version"], capture_output=True, text=True).stdout
    if "v=7.0." not in version:
        pytest.skip(f"{found} is not Redis 7.0: {version.strip()}")
    return Path(found)
