"""Choosing among replicas: only owners, AEBS as published, rows split level, and the regime from measured times."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from cluster.execution.replica_choice import (
    NOBODY,
    SKIPPED,
    LayerReplicas,
    ReplicaCosts,
    batch_regime,
    choose_fewest_experts,
    choose_replicas,
    split_rows,
)
from cluster.placement.cost import Regime

NUM_EXPERTS = 12


def layer_of(seed: int) -> tuple[list[set[int]], np.ndarray, int]:
    """Experts of each host, every expert with at least one owner; choices of some rows."""
    rng = np.random.default_rng(seed)
    num_hosts = int(rng.integers(1, 6))
    has = rng.random((num_hosts, NUM_EXPERTS)) < rng.choice([0.1, 0.5])
    has[rng.integers(num_hosts, size=NUM_EXPERTS), np.arange(NUM_EXPERTS)] = True
    rows = rng.integers(0, NUM_EXPERTS + 1, size=(int(rng.integers(1, 30)), 3))
    return [set(np.flatnonzero(own).tolist()) for own in has], rows, num_hosts


SEEDS = st.integers(0, 2**32 - 1)


def equal_costs(num_hosts: int, *, expert_s: float, row_s: float) -> ReplicaCosts:
    return ReplicaCosts.measured([expert_s] * num_hosts, [row_s] * num_hosts)


@given(seed=SEEDS, expert_s=st.sampled_from([0.0, 1e-6, 1e-3]), row_s=st.sampled_from([0.0, 1e-6, 1e-3]))
@settings(max_examples=50, deadline=None)
def test_every_choice_goes_to_an_owner(seed: int, expert_s: float, row_s: float) -> None:
    owned, ids, num_hosts = layer_of(seed)

    hosts = choose_replicas(
        ids, LayerReplicas.of(owned, NUM_EXPERTS), equal_costs(num_hosts, expert_s=expert_s, row_s=row_s)
    )

    assert hosts.shape == ids.shape
    for expert, host in zip(ids.ravel(), hosts.ravel(), strict=True):
        assert host == SKIPPED if expert == NUM_EXPERTS else expert in owned[host]


@given(seed=SEEDS)
@settings(max_examples=50, deadline=None)
def test_aebs_is_as_published(seed: int) -> None:
    owned, ids, num_hosts = layer_of(seed)
    rows = np.bincount(ids.ravel(), minlength=NUM_EXPERTS + 1)[:NUM_EXPERTS]
    costs = equal_costs(num_hosts, expert_s=1e-3, row_s=1e-6)

    table = choose_fewest_experts(rows, LayerReplicas.of(owned, NUM_EXPERTS), costs)

    activated = [0] * num_hosts
    owners = [[host for host in range(num_hosts) if expert in owned[host]] for expert in range(NUM_EXPERTS)]
    for expert in np.flatnonzero(rows):
        if len(owners[expert]) == 1:
            activated[owners[expert][0]] += 1
    for expert in np.flatnonzero(rows):
        if len(owners[expert]) > 1:
            host = min(owners[expert], key=lambda p: (activated[p], p))
            activated[host] += 1
            assert table[expert] == host


@given(seed=SEEDS)
@settings(max_examples=50, deadline=None)
def test_splitting_never_makes_the_busiest_host_busier_than_first_owners_do(
    seed: int,
) -> None:
    owned, ids, num_hosts = layer_of(seed)
    rows = np.bincount(ids.ravel(), minlength=NUM_EXPERTS + 1)[:NUM_EXPERTS]
    replicas = LayerReplicas.of(owned, NUM_EXPERTS)
    costs = equal_costs(num_hosts, expert_s=1e-9, row_s=1e-3)

    hosts = split_rows(ids, rows, replicas, costs)

    given_rows = np.bincount(hosts[hosts >= 0], minlength=num_hosts)
    first_rows = np.bincount(replicas.sole[ids][ids < NUM_EXPERTS], minlength=num_hosts)
    assert given_rows.sum() == rows.sum()
    assert given_rows.max() <= first_rows.max() + len(replicas.replicated)  # shares are rounded to rows


def test_a_hot_expert_is_split_level_and_by_speed() -> None:
    replicas = LayerReplicas.of([{0}, {0}, {0, 1}], 2)
    ids = np.zeros((90, 1), dtype=int)

    level = split_rows(ids, np.array([90, 0]), replicas, equal_costs(3, expert_s=1e-9, row_s=1e-3))
    costs = ReplicaCosts.measured([1e-9] * 3, [1e-3, 1e-3, 5e-4])
    by_speed = split_rows(ids, np.array([90, 0]), replicas, costs)

    assert np.bincount(level.ravel()).tolist() == [30, 30, 30]
    assert np.bincount(by_speed.ravel()).tolist() in ([22, 23, 45], [23, 22, 45])


def test_an_owner_that_would_begin_too_late_is_not_woken_for_a_few_rows() -> None:
    """Host 0 has 60 rows of its own; reading another expert takes as long as 50. Of 20 rows it gets none."""
    replicas = LayerReplicas.of([{0, 1}, {1}], 2)
    ids = np.array([[0]] * 60 + [[1]] * 20)

    hosts = split_rows(ids, np.array([60, 20]), replicas, equal_costs(2, expert_s=0.05, row_s=1e-3))

    assert hosts.ravel().tolist() == [0] * 60 + [1] * 20


def test_the_regime_follows_measured_times() -> None:
    decode, prefill = np.array([1, 1, 1, 1]), np.array([300, 200, 100, 50])
    costs = equal_costs(2, expert_s=1e-3, row_s=5e-5)

    assert batch_regime(decode, costs) is Regime.MEMORY
    assert batch_regime(prefill, costs) is Regime.COMPUTE


def test_without_replicas_owners_are_looked_up_and_unowned_experts_are_nobodys() -> None:
    replicas = LayerReplicas.of([{0, 2}, {1}], 4)

    hosts = choose_replicas(np.array([[0, 1], [2, 3], [4, 0]]), replicas, equal_costs(2, expert_s=1.0, row_s=1.0))

    assert hosts.tolist() == [[0, 1], [0, NOBODY], [SKIPPED, 0]]


def test_what_was_not_measured_counts_as_the_others() -> None:
    assert ReplicaCosts.measured([0.0, 2.0, 4.0], [0.0] * 3).expert_s == (3.0, 2.0, 4.0)
