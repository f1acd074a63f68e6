"""The embedded Valkey's keeper: a program that ends comes back under the same URL. Without Ray around it."""

from __future__ import annotations

import os
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from live_server import poll

import actors.ray_shells.valkey_actor as valkey_actor
from actors.ray_shells.valkey_actor import ValkeyHolder
from cluster.stats.redis_store import RedisStore


@pytest.fixture
def holder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[ValkeyHolder]:
    context = SimpleNamespace(get_actor_id=lambda: "a1")
    monkeypatch.setattr(valkey_actor.ray, "get_runtime_context", lambda: context)
    monkeypatch.setattr(valkey_actor.ray.util, "get_node_ip_address", lambda: "127.0.0.1")
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    holder = ValkeyHolder()
    yield holder
    holder.stop()


def _answers(url: str) -> bool:
    try:
        RedisStore(url).ping()
    except ConnectionError:
        return False
    return True


def test_a_killed_program_comes_back_under_its_url(holder: ValkeyHolder) -> None:
    url = holder.url()
    assert _answers(url)
    assert holder._server is not None
    first = holder._server

    os.kill(first.pid, signal.SIGKILL)

    poll(lambda: holder._server is not first and _answers(url), deadline_s=60, what="the program is back")


def test_a_restarted_actor_has_the_url_it_had(holder: ValkeyHolder) -> None:
    url = holder.url()
    holder._stopped.set()
    assert holder._server is not None
    holder._server.stop()

    after = ValkeyHolder()  # Ray makes it again, with the same actor id
    try:
        assert after.url() == url
        assert _answers(url)
    finally:
        after.stop()


def test_stop_leaves_nothing_behind(holder: ValkeyHolder, tmp_path: Path) -> None:
    url = holder.url()
    holder.stop()

    assert not _answers(url)
    assert not list(tmp_path.glob("moesaic-valkey-*"))
