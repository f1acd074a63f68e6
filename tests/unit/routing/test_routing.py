"""The router: who may take a request, what it costs, and that a wave of requests does not end up in one place."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from knowledge_builders import embedding_of, make_knowledge

from cluster.errors import Overloaded, Unavailable
from cluster.routing.prefix_memory import block_hashes
from cluster.routing.router import RouterState, RoutingRequest, RoutingSettings
from cluster.status.reports import RoutingView, WorkerReport
from cluster.types import StartupPhase, Tier

POLICIES = ("semantic", "random", "least-loaded", "prefix-affinity")
LAYERS, EXPERTS, KINDS = 3, 8, 4
EXACT = RoutingSettings(band=0.0, exploration=0.0)


def _knowledge() -> Any:
    """Kind g uses experts 2 g and 2 g + 1 of every layer."""
    uses = np.full((KINDS, LAYERS, EXPERTS), 0.01)
    for kind in range(KINDS):
        uses[kind, :, 2 * kind : 2 * kind + 2] = 0.97
    return make_knowledge(uses)


def _resident(*kinds: int) -> bytes:
    bits = np.zeros((LAYERS, EXPERTS), dtype=np.bool_)
    for kind in kinds:
        bits[:, 2 * kind : 2 * kind + 2] = True
    return np.packbits(bits).tobytes()


def _worker(name: str, **fields: Any) -> WorkerReport:
    defaults: dict[str, Any] = {
        "worker_id": name,
        "replica_id": name,
        "node_id": "n",
        "phase": StartupPhase.READY,
        "layers": tuple(range(LAYERS)),
        "num_experts": EXPERTS,
        "top_k": 2,
        "max_open": 20,
        "num_running": 4,
        "step_s": 0.02,
        "prefill_token_s": 0.001,
        "resident": _resident(),
        "miss_s": {Tier.DISK: 0.003},
    }
    return WorkerReport(**(defaults | fields))


def _router(
    workers: Sequence[WorkerReport], policy: str = "semantic", *, seed: int = 0, at: RoutingSettings = EXACT
) -> RouterState:
    router = RouterState(policy, np.random.default_rng(seed), at)
    router.update(RoutingView(workers=tuple((worker, 0.5) for worker in workers), knowledge=_knowledge()), 10.0)
    return router


def _request(kind: int | None = 0, **fields: Any) -> RoutingRequest:
    embedding = b"" if kind is None else embedding_of(kind)
    return RoutingRequest(**({"num_tokens": 50, "max_tokens": 64, "embedding": embedding} | fields))


def test_a_prompt_goes_where_its_experts_are() -> None:
    router = _router([_worker("a", resident=_resident(0, 1)), _worker("b", resident=_resident(2, 3))])

    assert [router.rank(_request(kind))[0] for kind in range(KINDS)] == ["a", "a", "b", "b"]


def test_kinds_part_although_one_worker_measures_longer_times() -> None:
    """Neighbours on a machine make times waver by more than prompts differ: each has its kinds all the same."""
    usual = {"step_s": 0.02, "num_waiting": 3}
    for slower in ("a", "b"):
        workers = [
            _worker(
                name,
                resident=resident,
                **usual | ({"miss_s": {Tier.DISK: 0.012}, "prefill_token_s": 0.004} if name == slower else {}),
            )
            for name, resident in (("a", _resident(0, 1)), ("b", _resident(2, 3)))
        ]
        assert [_router(workers).rank(_request(kind))[0] for kind in range(KINDS)] == ["a", "a", "b", "b"]


def test_a_much_slower_worker_is_not_taken_as_long_as_nobody_waits() -> None:
    fast, slow = _worker("a", num_running=1), _worker("b", num_running=1, miss_s={Tier.DISK: 0.03})
    assert _router([fast, slow]).rank(_request(0)) == ["a", "b"]


def test_a_prompt_goes_where_its_prefix_is_when_all_else_is_equal() -> None:
    router = _router([_worker("a"), _worker("b")])
    prompt = _request(None, blocks=block_hashes(range(50)))
    router.note_sent("b", prompt, 10.0)
    router.update(RoutingView(workers=tuple((_worker(n), 0.0) for n in "ab"), knowledge=None), 11.0)

    assert router.rank(prompt)[0] == "b"
    other = _request(None, blocks=block_hashes(range(100, 150)))
    assert {_router([_worker("a"), _worker("b")], seed=s).rank(other)[0] for s in range(20)} == {"a", "b"}


def test_experts_are_not_worth_any_queue() -> None:
    busy = _worker("a", resident=_resident(0), num_waiting=15)
    router = _router([busy, _worker("b", resident=_resident(3))])

    assert router.rank(_request(0)) == ["b", "a"]


def test_a_faster_tier_is_nearer() -> None:
    slow = {Tier.DISK: 0.003, Tier.RAM: 0.0001}
    near, far = _worker("a", miss_s=slow, ram_resident=_resident(0)), _worker("b", miss_s=slow)

    assert _router([near, far]).rank(_request(0)) == ["a", "b"]
    assert _router([far, near]).rank(_request(0)) == ["a", "b"]


def test_costs_follow_what_workers_really_waited_for() -> None:
    """Where prefetch hides every load, residency is worth nothing and the emptier worker gets the request."""
    here, there = _worker("a", resident=_resident(0), num_running=5), _worker("b", num_running=4)
    router = _router([here, there], at=RoutingSettings(exploration=0.0))
    assert router.rank(_request(0))[0] == "a"

    for number in range(1, 100):
        steps = {"steps": 50 * number, "stall_s": 1e-6 * number, "misses": 50 * number}
        view = tuple((replace(worker, **steps), 0.0) for worker in (here, there))
        router.update(RoutingView(workers=view, knowledge=_knowledge()), 10.0 + number)

    assert router.rank(_request(0))[0] == "b"


@pytest.mark.parametrize("policy", POLICIES)
def test_only_workers_that_can_take_a_request_are_ranked(policy: str) -> None:
    workers = [
        _worker("starting", phase=StartupPhase.LOADING),
        _worker("draining", phase=StartupPhase.DRAINING),
        _worker("full", num_running=8, num_waiting=12),
        _worker("lost"),
        _worker("stalled", stalled_s=60.0),
        _worker("well"),
    ]

    assert _router(workers, policy).rank(_request(avoid=frozenset({"lost"}))) == ["well"]
    assert _router(workers[:-1], policy).rank(_request(avoid=frozenset({"lost"}))) == ["stalled"]
    with pytest.raises(Overloaded, match="1 attention workers"):
        _router(workers[:4], policy).rank(_request(avoid=frozenset({"lost"})))
    with pytest.raises(Unavailable, match="of 2 attention workers 0 are ready"):
        _router(workers[:2], policy).rank(_request())
    with pytest.raises(Unavailable):
        RouterState(policy, np.random.default_rng(0)).rank(_request())


@pytest.mark.parametrize("policy", ["semantic", "least-loaded", "prefix-affinity"])
def test_a_wave_between_two_reports_spreads(policy: str) -> None:
    """What this router sent since counts: forty requests of one kind do not all go to the worker that knows it."""
    router = _router(
        [_worker("a", resident=_resident(0), max_open=100), *(_worker(n, max_open=100) for n in "bcd")], policy
    )
    took: Counter[str] = Counter()
    for _ in range(40):
        request = _request(0, blocks=block_hashes(range(50)))
        name = router.rank(request)[0]
        router.note_sent(name, request, 10.0)
        took[name] += 1

    assert max(took.values()) <= 1.25 * (4 + 10 + 0.25) - 4 + 1
    assert len(took) == 4


def test_what_the_report_contains_is_not_counted_twice() -> None:
    router = _router([_worker("a"), _worker("b")], "least-loaded")
    for _ in range(3):
        router.note_sent("a", _request(), 10.0)
    assert router.rank(_request())[0] == "b"

    after = tuple((_worker(n, num_running=running), 0.0) for n, running in (("a", 5), ("b", 7)))
    router.update(RoutingView(workers=after, knowledge=None), 11.0)
    assert router.rank(_request())[0] == "a"
    for _ in range(4):
        router.note_finished("b", 12.0)
    assert router.rank(_request())[0] == "b"


def test_equal_workers_share_requests_by_two_choices() -> None:
    """Routers with the same old view do not all choose the same worker."""
    workers = [_worker(name, num_running=running) for name, running in zip("abcd", (7, 7, 8, 8), strict=True)]
    first = Counter(
        _router(workers, seed=seed, at=RoutingSettings(band=0.5)).rank(_request(None))[0] for seed in range(300)
    )

    assert set(first) == {"a", "b", "c", "d"}
    assert first["a"] + first["b"] > first["c"] + first["d"]


_reports = st.builds(
    _worker,
    st.text("abcdefgh", min_size=1, max_size=8),
    phase=st.sampled_from([StartupPhase.READY, StartupPhase.READY, StartupPhase.LOADING]),
    num_running=st.integers(0, 12),
    num_waiting=st.integers(0, 12),
    waiting_tokens=st.integers(0, 10_000),
    step_s=st.sampled_from([0.0, 1e-6, 0.02, 3.0]),
    prefill_token_s=st.sampled_from([0.0, 1e-3]),
    stalled_s=st.sampled_from([0.0, 100.0]),
    resident=st.one_of(st.just(b""), st.lists(st.integers(0, KINDS - 1)).map(lambda kinds: _resident(*kinds))),
    miss_s=st.sampled_from([{}, {Tier.DISK: 0.0}, {Tier.DISK: 0.01}, {Tier.RAM: 0.001, Tier.REMOTE: 0.002}]),
)
_fleets = st.lists(_reports, min_size=1, max_size=6, unique_by=lambda report: report.replica_id)


@settings(deadline=None)
@given(_fleets, st.sampled_from(POLICIES), st.integers(0, 3), st.integers(0, 30), st.randoms(use_true_random=False))
def test_no_full_worker_while_another_fits_and_the_order_of_workers_is_nothing(
    workers: list[WorkerReport], policy: str, kind: int, num_sent: int, shuffle: Any
) -> None:
    shuffled = list(workers)
    shuffle.shuffle(shuffled)
    routers = [_router(view, policy, seed=3, at=RoutingSettings()) for view in (workers, shuffled)]
    load = {worker.replica_id: worker.num_running + worker.num_waiting for worker in workers}
    ready = {worker.replica_id for worker in workers if worker.phase is StartupPhase.READY}
    fits = {name for name in ready if load[name] < 20}
    for _ in range(num_sent + 1):
        if not fits:
            with pytest.raises(Overloaded if ready else Unavailable):
                routers[0].rank(_request(kind))
            return
        ranked = routers[0].rank(_request(kind))
        assert ranked == routers[1].rank(_request(kind))
        assert set(ranked) <= fits and len(set(ranked)) == len(ranked) > 0
        for router in routers:
            router.note_sent(ranked[0], _request(kind), 10.0)
        load[ranked[0]] += 1
        fits = {name for name in fits if load[name] < 20}


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(0, 40))
def test_before_anything_is_known_it_is_least_loaded(num_workers: int, num_sent: int) -> None:
    """No times, no residency, no knowledge: finite costs, and nobody gets two more than another."""
    cold = [
        _worker(str(i), num_running=0, step_s=0.0, prefill_token_s=0.0, miss_s={}, max_open=999)
        for i in range(num_workers)
    ]
    router = RouterState("semantic", np.random.default_rng(0))
    router.update(RoutingView(workers=tuple((worker, 0.0) for worker in cold), knowledge=None), 1.0)
    took = Counter({worker.replica_id: 0 for worker in cold})
    for _ in range(num_sent):
        name = router.rank(_request(None))[0]
        router.note_sent(name, _request(None), 1.0)
        took[name] += 1

    assert max(took.values()) - min(took.values()) <= 2
