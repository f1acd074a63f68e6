"""What every `StateStore` promises of decayed statistics, prompts and states (stores: conftest.py)."""

from __future__ import annotations

import multiprocessing
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import redis

from cluster.protocols import StateStore
from cluster.semantics.statistics import COUNT, MASS, ExpertStatistics, no_statistics
from cluster.stats.embedded_valkey import EmbeddedValkey
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.memory_store import MemoryStore
from cluster.stats.recent_prompts import MAX_PROMPTS
from cluster.stats.redis_store import RedisStore

LAYERS, NUM_EXPERTS = (0, 3, 10), 5
LONG_S = 1e9  # a half-life in which a test is no time at all
StartServer = Callable[..., EmbeddedValkey]


def _counted(
    version: int, by_row: dict[tuple[int, int, int, int], tuple[float, float]], num_clusters: int = 2
) -> ExpertStatistics:
    """Args: by_row: (cluster, phase, layer row, expert) -> count and mass."""
    statistics = no_statistics(version, num_clusters, LAYERS, NUM_EXPERTS)
    for place, values in by_row.items():
        statistics.values[place] = values
    return statistics


def _values(store: StateStore, fingerprint: str, version: int = 1) -> np.ndarray:
    statistics = store.statistics(fingerprint, version, half_life_s=LONG_S)
    assert statistics is not None
    assert statistics.clusters_version == version and statistics.layers == LAYERS
    return statistics.values


def test_statistics_add_up_by_cluster_phase_layer_and_expert(store: StateStore, fingerprint: str) -> None:
    assert store.statistics(fingerprint, 1, half_life_s=LONG_S) is None
    first = _counted(1, {(0, 1, 0, 3): (2, 0.5), (2, 0, 2, 4): (7, 1.75)})
    second = _counted(1, {(0, 1, 0, 3): (4, 1.25), (1, 0, 1, 0): (1, 0.25)})
    store.add_statistics(fingerprint, first, (), half_life_s=LONG_S)
    store.add_statistics(fingerprint, second, (), half_life_s=LONG_S)

    np.testing.assert_allclose(_values(store, fingerprint), first.values + second.values, rtol=1e-6)
    assert store.statistics(fingerprint + "-other", 1, half_life_s=LONG_S) is None
    assert first.values[0, 1, 0, 3].tolist() == [2, 0.5], "the argument is as it was"


def test_a_large_model_fits(store: StateStore, fingerprint: str) -> None:
    """More numbers in a row than Lua's stack takes values, large counts, and all rows at once."""
    delta = no_statistics(3, 1, range(4), 4097)
    delta.values[:] = np.random.default_rng(0).integers(0, 2**20, delta.values.shape)
    for _ in range(2):
        store.add_statistics(fingerprint, delta, (), half_life_s=LONG_S)
    total = store.statistics(fingerprint, 3, half_life_s=LONG_S)
    assert total is not None
    np.testing.assert_allclose(total.values, 2 * delta.values, rtol=1e-6)


def test_activations_count_half_after_a_half_life(store: StateStore, fingerprint: str) -> None:
    """Seen from outside: what is left says how much time has gone by, between the calls and around them."""
    half_life_s = 0.05
    before_s = time.monotonic()
    store.add_statistics(fingerprint, _counted(1, {(0, 1, 0, 0): (1024, 512)}), (), half_life_s=half_life_s)
    added_s = time.monotonic()
    while time.monotonic() - added_s < 2 * half_life_s:
        time.sleep(0.01)
    read_s = time.monotonic()
    found = store.statistics(fingerprint, 1, half_life_s=half_life_s)
    after_s = time.monotonic()
    assert found is not None
    count, mass = found.values[0, 1, 0, 0]
    least, most = (1024 * 0.5 ** (t / half_life_s) for t in (after_s - before_s, read_s - added_s))
    assert 0.95 * least <= count <= 1.05 * most
    assert mass == pytest.approx(count / 2)

    store.add_statistics(fingerprint, _counted(1, {(0, 1, 0, 0): (1024, 512)}), (), half_life_s=half_life_s)
    found = store.statistics(fingerprint, 1, half_life_s=half_life_s)
    assert found is not None
    assert 1024 * 0.5 ** ((time.monotonic() - after_s) / half_life_s) * 0.95 <= found.values[0, 1, 0, 0, COUNT]
    assert found.values[0, 1, 0, 0, COUNT] <= 1.05 * (1024 + most), "what was there has faded, what came has not"


def test_the_newest_two_versions_of_clusters_are_kept(store: StateStore, fingerprint: str) -> None:
    for version in (4, 5, 6, 5, 4, 3):  # workers learn of a new version one after the other
        store.add_statistics(fingerprint, _counted(version, {(0, 1, 0, 0): (version, 1)}), (), half_life_s=LONG_S)

    found = [store.statistics(fingerprint, version, half_life_s=LONG_S) for version in (3, 4, 5, 6, 7)]
    kept = [None if each is None else float(each.values[0, 1, 0, 0, COUNT]) for each in found]
    assert kept == [None, None, pytest.approx(10), pytest.approx(6), None]


def test_another_shape_of_the_same_version_is_refused(store: StateStore, fingerprint: str) -> None:
    store.add_statistics(fingerprint, _counted(1, {(0, 0, 0, 0): (1, 1)}), (), half_life_s=LONG_S)
    with pytest.raises(ValueError, match="shape"):
        store.add_statistics(fingerprint, _counted(1, {}, num_clusters=3), (), half_life_s=LONG_S)
    assert _values(store, fingerprint).sum() == pytest.approx(2)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_sums_that_are_not_finite_are_refused_and_change_nothing(
    store: StateStore, fingerprint: str, value: float
) -> None:
    store.add_statistics(fingerprint, _counted(1, {(0, 0, 0, 0): (1, 1)}), (), half_life_s=LONG_S)
    with pytest.raises(ValueError, match="not finite"):
        store.add_statistics(fingerprint, _counted(1, {(0, 0, 0, 0): (1, value)}), (), half_life_s=LONG_S)
    assert _values(store, fingerprint).sum() == pytest.approx(2)


def test_a_row_that_somebody_spoilt_counts_nothing_and_heals(valkey: EmbeddedValkey, fingerprint: str) -> None:
    store = RedisStore(valkey.url)
    counted = _counted(1, {(0, 0, 0, 0): (1, 1), (1, 0, 0, 2): (4, 2)})
    store.add_statistics(fingerprint, counted, (), half_life_s=LONG_S)
    with redis.Redis.from_url(valkey.url) as client:
        (key,) = client.scan_iter(f"*{fingerprint}*statistics*")
        row = np.frombuffer(client.hget(key, "0:0:0"), "<f8").copy()
        row[1:3] = np.nan, np.inf
        client.hset(key, "0:0:0", row.tobytes())

    assert _values(store, fingerprint).sum() == pytest.approx(6), "the other row"

    store.add_statistics(fingerprint, _counted(1, {(0, 0, 0, 0): (3, 2)}), (), half_life_s=LONG_S)
    assert _values(store, fingerprint)[0, 0, 0, 0].tolist() == pytest.approx([3, 2])


def test_prompts_are_the_latest_and_bounded(store: StateStore, fingerprint: str) -> None:
    nothing = _counted(1, {})
    assert store.recent_prompts(fingerprint) == []
    store.add_statistics(fingerprint, nothing, [b"a", b"", b"b"], half_life_s=LONG_S)
    store.add_statistics(fingerprint, nothing, [b"\x00\xff c"], half_life_s=LONG_S)
    assert store.recent_prompts(fingerprint) == [b"\x00\xff c", b"b", b"a"]
    assert store.recent_prompts(fingerprint + "-other") == []

    many = [number.to_bytes(2, "big") for number in range(MAX_PROMPTS + 10)]
    store.add_statistics(fingerprint, nothing, many, half_life_s=LONG_S)
    assert store.recent_prompts(fingerprint) == many[: -MAX_PROMPTS - 1 : -1]
    with pytest.raises(ValueError, match="65 bytes"):
        store.add_statistics(fingerprint, nothing, [bytes(65)], half_life_s=LONG_S)


def test_states_never_go_backwards(store: StateStore, fingerprint: str) -> None:
    assert store.get_state(fingerprint, "clusters") is None
    assert store.put_state(fingerprint, "clusters", b"\x00\xff", 3)
    assert not store.put_state(fingerprint, "clusters", b"old", 2)
    assert not store.put_state(fingerprint, "clusters", b"same", 3)
    assert store.get_state(fingerprint, "clusters") == (3, b"\x00\xff")
    assert store.put_state(fingerprint, "clusters", b"", 10)
    assert store.get_state(fingerprint, "clusters") == (10, b"")
    assert store.get_state(fingerprint, "placement") is None


def _add_from_another_process(url: str, fingerprint: str, times: int, go: Path) -> None:
    store = RedisStore(url)
    deadline_s = time.monotonic() + 30
    while not go.exists() and time.monotonic() < deadline_s:
        time.sleep(0.001)
    for _ in range(times):
        store.add_statistics(fingerprint, _counted(1, {(0, 1, 0, 0): (1, 0.5)}), (), half_life_s=LONG_S)


def test_two_processes_that_add_at_once_lose_nothing(
    start_server: StartServer, fingerprint: str, tmp_path: Path
) -> None:
    server, go = start_server(tmp_path), tmp_path / "go"
    context = multiprocessing.get_context("spawn")
    args = (server.url, fingerprint, 200, go)
    processes = [context.Process(target=_add_from_another_process, args=args) for _ in range(2)]
    for process in processes:
        process.start()
    go.touch()
    for process in processes:
        process.join(60)
        assert process.exitcode == 0
    values = _values(RedisStore(server.url), fingerprint)
    assert values[0, 1, 0, 0].tolist() == pytest.approx([400, 200])


def test_a_restarted_server_gets_back_what_processes_had_added(
    start_server: StartServer, fingerprint: str, tmp_path: Path
) -> None:
    server = start_server(tmp_path)
    first, second = RedisStore(server.url), RedisStore(server.url)
    first.add_statistics(fingerprint, _counted(1, {(0, 1, 0, 0): (10, 5)}), (), half_life_s=LONG_S)
    first.add_statistics(fingerprint, _counted(2, {(1, 1, 0, 0): (3, 1)}), (), half_life_s=LONG_S)
    second.add_statistics(fingerprint, _counted(2, {(1, 1, 0, 0): (4, 1)}), (), half_life_s=LONG_S)
    server.stop()
    with pytest.raises(ConnectionError):
        first.add_statistics(fingerprint, _counted(2, {(0, 0, 0, 0): (1, 1)}), (), half_life_s=LONG_S)
    start_server(tmp_path, server.port)

    first.add_statistics(fingerprint, _counted(2, {(1, 1, 0, 0): (1, 0)}), (), half_life_s=LONG_S)
    assert _values(first, fingerprint, 2)[1, 1, 0, 0, COUNT] == pytest.approx(4), "this process's"
    assert _values(second, fingerprint, 2)[1, 1, 0, 0, COUNT] == pytest.approx(8), "to read is enough to notice"
    assert _values(first, fingerprint, 1)[0, 1, 0, 0].tolist() == pytest.approx([10, 5])
    assert _values(first, fingerprint, 2)[0, 0, 0, 0, COUNT] == 0, "what the caller was refused is not kept here"


def test_memory_is_bounded_and_given_back(valkey: EmbeddedValkey, fingerprint: str) -> None:
    store = RedisStore(valkey.url)
    for version in range(1, 8):
        full = no_statistics(version, 2, LAYERS, NUM_EXPERTS)
        full.values[:] = 1
        store.add_statistics(fingerprint, full, [b"p"], half_life_s=LONG_S)
    with redis.Redis.from_url(valkey.url) as client:
        keys = {
            key.decode().removeprefix(f"moesaic:v3:moesaic:moesaic:{fingerprint}:"): key
            for key in client.scan_iter(f"*{fingerprint}*")
        }
        assert set(keys) == {"epoch", "statistics:0", "statistics:1", "prompts"}
        assert client.hlen(keys["statistics:1"]) == 2 + 3 * 2 * len(LAYERS)
        assert all(client.pttl(key) > 0 for name, key in keys.items() if name != "epoch")


def test_unreachable_redis_is_a_connection_error() -> None:
    store = RedisStore("redis://127.0.0.1:1/0", timeout_s=0.2)
    fallback = FallbackStore(store)
    for each in (store, fallback):
        for call in (
            lambda each=each: each.add_statistics("f", _counted(1, {}), [b"p"], half_life_s=1),
            lambda each=each: each.statistics("f", 1, half_life_s=1),
            lambda each=each: each.recent_prompts("f"),
            lambda each=each: each.put_state("f", "n", b"", 1),
            lambda each=each: each.get_state("f", "n"),
        ):
            with pytest.raises(ConnectionError, match=r"redis://127\.0\.0\.1:1"):
                call()
    assert fallback.degraded is not None


def test_in_memory_statistics_fade_by_the_clock_given() -> None:
    now_s = 0.0
    store = MemoryStore(clock=lambda: now_s)
    store.add_statistics("f", _counted(1, {(0, 1, 0, 0): (8, 4)}), (), half_life_s=10)
    now_s = 20.0
    store.add_statistics("f", _counted(1, {(0, 1, 0, 0): (8, 4)}), (), half_life_s=10)
    now_s = 30.0
    found = store.statistics("f", 1, half_life_s=10)
    assert found is not None
    assert found.values[0, 1, 0, 0].tolist() == [(8 / 4 + 8) / 2, (4 / 4 + 4) / 2]
    assert found.values[0, 1, 0, 0, MASS] == 2.5
