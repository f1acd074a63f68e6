"""Redis is away when the server starts: it serves, says so, and counts are not lost."""

from __future__ import annotations

import signal
from pathlib import Path
from typing import Any

import httpx
import pytest
import redis
from live_server import LiveServer, free_port, poll, running_server

from cluster.stats.embedded_valkey import start_embedded_valkey

pytestmark = pytest.mark.ray


def _generate(server: LiveServer) -> None:
    body = {"model": "moesaic-demo", "prompt": "Once upon a time", "max_tokens": 8}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()


def _counted_in_redis(url: str) -> int:
    with redis.Redis.from_url(url) as store:
        keys = list(store.scan_iter("moesaic:v3:moesaic:moesaic:*:activations:*"))
        return sum(int(count) for key in keys for count in store.hvals(key))


def _counted_by_worker(server: LiveServer) -> int:
    (worker,) = server.get("/experts")["workers"]
    return _total(worker["layers"])


def _total(layers: list[dict[str, Any]]) -> int:
    return sum(sum(counts) for layer in layers for counts in layer["activations"].values())


def test_unreachable_redis_degrades_and_recovers(tmp_path: Path) -> None:
    port = free_port()
    with running_server("--redis-url", f"redis://:word@127.0.0.1:{port}/0") as server:
        _generate(server)
        (reason,) = poll(lambda: server.worker()["degraded"], deadline_s=60, what="degraded")
        assert "statistics store" in reason and str(port) in reason
        assert str(port) in server.get("/experts")["cluster"]["degraded"]
        assert server.get("/ready")["phase"] == "ready"

        valkey = start_embedded_valkey(tmp_path, port, password="word")
        try:
            poll(lambda: not server.worker()["degraded"], deadline_s=60, what=lambda: str(server.worker()["degraded"]))
            _generate(server)
            poll(
                lambda: _counted_in_redis(valkey.url) == _counted_by_worker(server) > 0,
                deadline_s=60,
                what=lambda: f"{_counted_in_redis(valkey.url)} counts in Redis, {_counted_by_worker(server)} made",
            )
            counted = _counted_by_worker(server)
            poll(lambda: _total(server.get("/experts")["cluster"]["layers"]) == counted, deadline_s=30, what="the page")
        finally:
            valkey.stop()

        poll(lambda: server.worker()["degraded"], deadline_s=60, what="degraded again")
        kept = poll(lambda: server.get("/experts")["cluster"], deadline_s=30, what="last counts")
        assert kept["degraded"] and _total(kept["layers"]) == counted
        _generate(server)
        server.stop(signal.SIGTERM)
