"""The parts of a plan, each against its definition: replication, packing, assignment, forecast, cost, tiers."""

from __future__ import annotations

from itertools import combinations_with_replacement, permutations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from cluster.placement.assignment import best_assignment
from cluster.placement.cost import (
    PhaseLoad,
    PlacementHost,
    Regime,
    demands_of,
    host_times,
    pair_bound,
    rows_to_hosts,
)
from cluster.placement.forecast import forecast, persistence, reliability
from cluster.placement.inputs import own_limits
from cluster.placement.rebuild import deal_slots, replicate
from cluster.placement.tiering import choose_tiers
from cluster.types import Phase, Tier

QUICK = settings(max_examples=25, deadline=None)


@given(weights=st.lists(st.integers(1, 50), min_size=2, max_size=4), extra=st.integers(0, 4), hosts=st.integers(1, 4))
@QUICK
def test_replication_is_the_best_for_the_largest_load_of_a_replica(weights: list[int], extra: int, hosts: int) -> None:
    weight = np.array([weights], dtype=float)

    copies = replicate(weight, len(weights) + extra, hosts)

    assert copies.min() >= 1 and copies.max() <= hosts and copies.sum() <= len(weights) + extra
    ways = (
        np.bincount(chosen, minlength=len(weights)) + 1
        for size in range(extra + 1)
        for chosen in combinations_with_replacement(range(len(weights)), size)
    )
    best = min(float((weight[0] / way).max()) for way in ways if way.max() <= hosts)
    assert float((weight / copies).max()) == pytest.approx(best)


@given(limits=st.lists(st.integers(0, 20), min_size=1, max_size=5), layers=st.integers(1, 4), experts=st.integers(1, 6))
@QUICK
def test_slots_are_dealt_within_memory_and_hold_every_expert(limits: list[int], layers: int, experts: int) -> None:
    limit = own_limits(limits, layers, experts)
    wanted = [experts] * layers

    given_LP = deal_slots(limit, wanted, experts)

    assert limit.sum() >= layers * experts
    assert (given_LP.sum(axis=0) <= limit).all() and given_LP.max() <= experts
    assert (given_LP.sum(axis=1) >= experts).all()


@given(worth=st.lists(st.lists(st.integers(0, 9), min_size=4, max_size=4), min_size=4, max_size=4))
@QUICK
def test_assignment_is_the_best_of_all(worth: list[list[int]]) -> None:
    array = np.array(worth, dtype=float)

    columns = best_assignment(array)

    best = max(sum(array[row, column] for row, column in enumerate(order)) for order in permutations(range(4)))
    assert sorted(columns) == [0, 1, 2, 3]
    assert array[range(4), columns].sum() == best


def test_assignment_keeps_off_what_is_forbidden() -> None:
    worth = np.array([[1.0, 9.0, -np.inf], [9.0, 1.0, -np.inf], [-np.inf, -np.inf, 0.0]])

    assert best_assignment(worth).tolist() == [1, 0, 2]


def test_chance_is_not_forecast_and_skew_is() -> None:
    rng = np.random.default_rng(0)
    even = rng.multinomial(400, np.full(32, 1 / 32), size=3).astype(float)
    skewed = rng.multinomial(40_000, rng.dirichlet(np.full(32, 1.0)), size=3).astype(float)

    assert np.ptp(forecast(even)) < 0.2 * np.ptp(even)
    assert reliability(skewed).min() > 0.95
    assert forecast(skewed) == pytest.approx(skewed, rel=0.05, abs=100)
    assert np.ptp(forecast(skewed, persistence=0.0)) == pytest.approx(0.0, abs=1e-9 * skewed.max()) or np.allclose(
        forecast(skewed, persistence=0.0), skewed.mean(axis=1, keepdims=True)
    )


def test_persistence_tells_a_lasting_skew_from_a_passing_one() -> None:
    rng = np.random.default_rng(1)
    skew, other = rng.dirichlet(np.full(32, 0.5), size=2)
    first, same, changed = (rng.multinomial(100_000, p, size=1).astype(float) for p in (skew, skew, other))

    assert persistence(first, same) > 0.95
    assert persistence(first, changed) < 0.5
    assert persistence(np.full((1, 8), 5.0), np.full((1, 8), 5.0)) == 0.0


@given(seed=st.integers(0, 1000))
@QUICK
def test_rows_sent_are_bounded_from_single_and_pair_chances(seed: int) -> None:
    """The bound is below the exact share of tokens that need a host, and above the largest chance of one expert."""
    rng = np.random.default_rng(seed)
    tokens = np.argsort(rng.random((200, 8)) * rng.random(8), axis=1)[:, :3]
    active = np.zeros((200, 8))
    np.put_along_axis(active, tokens, 1.0, axis=1)
    owned = np.zeros((2, 8), dtype=bool)
    owned[0, :4], owned[1, 4:] = True, True

    bound = rows_to_hosts(owned, active.mean(axis=0), active.T @ active / 200)

    exact = np.array([active[:, own].any(axis=1).mean() for own in owned])
    assert (bound <= exact + 1e-9).all()
    assert (bound >= 0.5 * exact).all()
    assert pair_bound(np.array([0.0]), np.array([0.0])).tolist() == [0.0]


def test_each_regime_counts_its_own_work() -> None:
    """One hot expert against four cold ones, in batches of 100 rows: rows, distinct experts and rows sent differ."""
    load = PhaseLoad(expected_LE=np.array([[96.0, 1, 1, 1, 1]]), tokens_per_s=100.0, rows_per_batch=100.0)
    owned = np.array([[[True, False, False, False, False], [False, True, True, True, True]]])

    def found(**times: float) -> tuple[Regime, list[float]]:
        hosts = [PlacementHost(index=index, capacity=5, **times) for index in range(2)]
        (demand,) = demands_of({Phase.DECODE: load}, hosts, 1)
        return demand.regime, host_times(demand, owned)[0].tolist()

    by_rows, by_experts, by_link = found(row_s=1e-3), found(expert_s=1e-3), found(link_row_s=1e-3)

    assert by_rows == (Regime.COMPUTE, pytest.approx([0.096, 0.004]))
    assert by_experts[0] is Regime.MEMORY and by_experts[1] == pytest.approx([0.001, 4 * 0.001 * (1 - 0.99**100)])
    assert by_link == (Regime.NETWORK, pytest.approx([0.096, 0.004]))
    assert found(row_s=1e-4, expert_s=1e-1)[0] is Regime.MEMORY
    assert found(row_s=1e-3, expert_s=1e-4)[0] is Regime.COMPUTE


MISS_S = {Tier.DEVICE: 0.0, Tier.RAM: 0.001, Tier.REMOTE: 0.003, Tier.DISK: 0.02}


@given(
    touches=st.lists(st.floats(0, 10), min_size=1, max_size=6),
    budgets=st.tuples(st.integers(0, 3), st.integers(0, 3), st.integers(0, 3)),
)
@QUICK
def test_equal_experts_are_tiered_for_the_least_stall(touches: list[float], budgets: tuple[int, int, int]) -> None:
    room = dict(zip((Tier.DEVICE, Tier.RAM, Tier.REMOTE), budgets, strict=True))

    plan = choose_tiers(touches, [1] * len(touches), room, MISS_S, [Tier.DISK] * len(touches), hysteresis=0.0)

    places = [tier for tier, count in room.items() for _ in range(count)] + [Tier.DISK] * len(touches)
    best = sum(t * MISS_S[tier] for t, tier in zip(sorted(touches, reverse=True), places, strict=False))
    tiers = [plan.tiers[int(rank)] for rank in plan.tier]
    assert sum(t * MISS_S[tier] for t, tier in zip(touches, tiers, strict=True)) == pytest.approx(best)
    assert all(tiers.count(tier) <= count for tier, count in room.items())


def test_a_tier_is_not_swapped_for_a_trifle() -> None:
    now = [Tier.DEVICE, Tier.DISK]

    def tiers(colder: float) -> list[int]:
        return choose_tiers([1.0, colder], [1, 1], {Tier.DEVICE: 1}, MISS_S, now).tier.tolist()

    assert tiers(1.1) == [0, 3] and tiers(1.3) == [3, 0]


def test_more_stall_per_byte_comes_first() -> None:
    plan = choose_tiers([3.0, 2.0, 2.0], [3, 1, 1], {Tier.DEVICE: 3}, MISS_S, [Tier.DISK] * 3)

    assert plan.tier.tolist() == [3, 0, 0]
