"""A worker starts with what others learned, shares what it learns, and saves it; whatever the store and disk do."""

from __future__ import annotations

import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from stateful_policies import LearnedMean, states_of

from cluster.errors import ConfigError
from cluster.policies.policy_state import load_policy_state, pack_share, save_policy_state
from cluster.protocols import PolicyStateShare
from cluster.stats import policy_state_shares
from cluster.stats.fallback_store import FallbackStore
from cluster.stats.memory_store import MemoryStore
from cluster.stats.policy_state_loop import PolicyStateLoop

DEADLINE_S = 10.0


class _Store(MemoryStore):
    """Shared, and away when told so; reads wait while `held` is set. Counts what was published."""

    def __init__(self) -> None:
        super().__init__()
        self.away = False
        self.free = threading.Event()
        self.free.set()
        self.published: list[tuple[str, int]] = []

    @property
    def is_shared(self) -> bool:
        return True

    def publish_policy_state(self, fingerprint: str, name: str, owner: str, blob: bytes, weight: int) -> None:
        if self.away:
            raise ConnectionError("away")
        super().publish_policy_state(fingerprint, name, owner, blob, weight)
        self.published.append((owner, weight))

    def read_policy_states(self, fingerprint: str, name: str) -> list[PolicyStateShare]:
        assert self.free.wait(DEADLINE_S)
        if self.away:
            raise ConnectionError("away")
        return super().read_policy_states(fingerprint, name)


def _loop(
    store: MemoryStore | FallbackStore, owner: str, path: Path | None = None, **settings: float
) -> PolicyStateLoop:
    return PolicyStateLoop(store, "f", owner, path, **({"interval_s": 0.005} | settings))


def _share(mean: float, num_seen: int, fingerprint: str = "f") -> bytes:
    part = LearnedMean()
    part.learn(mean, num_seen)
    return pack_share(fingerprint, "mean", part.to_arrays())


def _wait_until(claim: Callable[[], bool]) -> None:
    end_s = time.monotonic() + DEADLINE_S
    while not claim():
        assert time.monotonic() < end_s
        time.sleep(0.002)


def test_a_second_worker_starts_with_what_the_first_published() -> None:
    store, first, second = _Store(), LearnedMean(), LearnedMean()
    loop = _loop(store, "w1")
    loop.start(states_of(mean=first))
    first.learn(4.0, times=10)
    _wait_until(lambda: ("w1", 10) in store.published)

    other = _loop(store, "w2")
    other.start(states_of(mean=second))
    assert (second.mean, second.num_seen) == (4.0, 10)
    loop.stop()
    other.stop()
    assert store.published == [("w1", 10)], "what did not change is not sent again, nor what came from others"


def test_what_a_file_told_is_shared(tmp_path: Path) -> None:
    store, part = _Store(), LearnedMean()
    part.learn(6.0, 4)
    save_policy_state(tmp_path / "l", "f", {"mean": part.to_arrays()})
    loop = _loop(store, "w1", tmp_path / "l")
    loop.start(states_of(mean=LearnedMean()))
    _wait_until(lambda: store.published == [("w1", 4)])
    loop.stop()


def test_what_does_not_change_is_sent_again_now_and_then() -> None:
    """A server that restarted has nothing left of it."""
    store, part = _Store(), LearnedMean()
    loop = _loop(store, "w1", repeat_s=0.01)
    loop.start(states_of(mean=part))
    part.learn(1.0)
    _wait_until(lambda: len(store.published) == 3)
    loop.stop()
    assert set(store.published) == {("w1", 1)}


def test_the_last_changes_go_out_at_the_end() -> None:
    store, part = _Store(), LearnedMean()
    loop = _loop(store, "w1", interval_s=1000)
    loop.start(states_of(mean=part))
    part.learn(1.0)
    loop.stop()
    assert store.published == [("w1", 1)]


def test_who_learned_most_counts_most() -> None:
    store, part = _Store(), LearnedMean()
    for i, (mean, num_seen) in enumerate([(0.0, 1), (8.0, 30), (2.0, 10), (0.0, 2), (6.0, 20)]):
        store.publish_policy_state("f", "mean", f"w{i}", _share(mean, num_seen), num_seen)
    loop = _loop(store, "new")
    loop.start(states_of(mean=part))
    loop.stop()
    assert part.num_seen == 60
    assert part.mean == pytest.approx((8 * 30 + 6 * 20 + 2 * 10) / 60)


@pytest.mark.parametrize(
    "bad", [b"junk", _share(3.0, 9, "other"), pack_share("f", "mean", {"num_learned": np.array(9)})]
)
def test_a_share_that_does_not_fit_is_left(bad: bytes, caplog: pytest.LogCaptureFixture) -> None:
    store, part = _Store(), LearnedMean()
    store.publish_policy_state("f", "mean", "good", _share(3.0, 5), 5)
    store.publish_policy_state("f", "mean", "bad", bad, 9)
    loop = _loop(store, "new")
    loop.start(states_of(mean=part))
    loop.stop()
    assert part.num_seen == 5
    assert caplog.text.count("a share was left") == 1


def test_a_store_that_is_away_costs_the_warm_start_only(caplog: pytest.LogCaptureFixture) -> None:
    primary, part = _Store(), LearnedMean()
    primary.away = True
    store = FallbackStore(primary, probe_interval_s=0.0)
    loop = _loop(store, "w1")
    loop.start(states_of(mean=part))
    assert "not all was learned that others know" in caplog.text
    part.learn(2.0)

    primary.away = False
    store.ping()  # as the statistics loop does
    _wait_until(lambda: primary.published == [("w1", 1)])
    loop.stop()


def test_a_store_that_hangs_delays_the_start_by_its_deadline(caplog: pytest.LogCaptureFixture) -> None:
    store, part = _Store(), LearnedMean()
    store.publish_policy_state("f", "mean", "w1", _share(5.0, 3), 3)
    store.free.clear()
    loop = _loop(store, "w2", warm_up_s=0.02)
    loop.start(states_of(mean=part))
    store.free.set()
    _wait_until(lambda: "not all was learned that others know" in caplog.text)
    assert part.num_seen == 0, "nothing changes while it serves"
    part.learn(1.0)
    _wait_until(lambda: ("w2", 1) in store.published)
    loop.stop()


def test_a_share_that_is_too_large_is_named_once(
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(policy_state_shares, "MAX_SHARE_BYTES", 1000)

    class Large(LearnedMean):
        def to_arrays(self) -> dict[str, np.ndarray]:
            noise = np.random.default_rng(0).bytes(1000)  # does not become smaller
            return super().to_arrays() | {"noise": np.frombuffer(noise, np.uint8)}

    store, part = _Store(), Large()
    loop = _loop(store, "w1")
    loop.start(states_of(mean=part))
    part.learn(1.0)
    _wait_until(lambda: bool(loop.degraded))
    part.learn(1.0)
    loop.stop()
    (reason,) = loop.degraded
    assert "share of mean" in reason and "at most 1000" in reason
    assert caplog.text.count("policy state is not shared") == 1
    assert store.published == []


def test_what_was_learned_is_there_after_a_restart(tmp_path: Path) -> None:
    path, part, again = tmp_path / "learned.npz", LearnedMean(), LearnedMean()
    save_policy_state(path, "f", {"of_another_policy": {"x": np.arange(3)}})
    loop = _loop(MemoryStore(), "w1", path, interval_s=1000)
    loop.start(states_of(mean=part))
    part.learn(7.0, 2)
    loop.stop()
    assert loop.num_published == 0, "a store that is not shared gets nothing"
    assert set(load_policy_state(path, "f")) == {"mean", "of_another_policy"}

    loop = _loop(MemoryStore(), "w2", path)
    loop.start(states_of(mean=again))
    loop.stop()
    assert (again.mean, again.num_seen) == (7.0, 2)


def test_a_file_of_another_model_does_not_start(tmp_path: Path) -> None:
    path = tmp_path / "learned.npz"
    save_policy_state(path, "other", {})
    before = path.read_bytes()
    loop = _loop(MemoryStore(), "w1", path)
    with pytest.raises(ConfigError, match=r"model other, the model here is f"):
        loop.start(states_of(mean=LearnedMean()))
    loop.stop()
    assert path.read_bytes() == before


def test_a_full_disk_at_the_end_is_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, part = tmp_path / "learned.npz", LearnedMean()
    part.learn(1.0)
    save_policy_state(path, "f", {"mean": part.to_arrays()})
    loop = _loop(MemoryStore(), "w1", path, interval_s=1000)
    loop.start(states_of(mean=LearnedMean()))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (512, limits[1]))
    try:
        loop.stop()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert "policy state was not saved" in caplog.text
    assert load_policy_state(path, "f")["mean"]["mean"] == [1.0]


def test_a_state_that_does_not_fit_leaves_its_thread_alive() -> None:
    states = states_of(mean=LearnedMean())
    with pytest.raises(ConfigError, match="no mean"):
        states.load({"mean": {"num_learned": np.array(1)}})
    states.load({"unknown": {}})


def test_what_is_not_finite_is_neither_taken_in_nor_told_nor_saved(tmp_path: Path) -> None:
    part = LearnedMean()
    part.learn(3.0)
    states = states_of(mean=part)

    with pytest.raises(ConfigError, match="not finite"):
        states.load({"mean": {"mean": np.array([np.nan]), "num_learned": np.array(5)}})

    assert part.mean == 3.0
    assert set(states.snapshot()) == {"mean"}
    part.mean = float("inf")
    assert states.snapshot() == {}
