"""Advice follows what was planted: a skew that lasts, one that passes, kinds of prompt that differ, or nothing."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from cluster.cli.diagnose import print_diagnosis
from cluster.control.diagnose import DiagnosisInputs, diagnose, gini
from cluster.placement import PhaseLoad, PlacementHost, PlacementInputs, even_placement, plan_placement
from cluster.placement.plan import Placement
from cluster.semantics.gain import deal_kinds, predicted_misses
from cluster.types import Phase

LAYERS, EXPERTS, HOSTS = 3, 16, 4


def inputs_of(first: np.ndarray, later: np.ndarray | None, kinds: np.ndarray | None = None) -> DiagnosisInputs:
    placement = PlacementInputs(
        layers=tuple(range(LAYERS)),
        num_experts=EXPERTS,
        top_k=2,
        expert_bytes=1000,
        hosts=tuple(PlacementHost(index=index, capacity=12, row_s=1e-3) for index in range(HOSTS)),
        current=Placement(epoch=1, hosts=dict(enumerate(even_placement(range(LAYERS), EXPERTS, HOSTS)))),
        loads={Phase.DECODE: PhaseLoad(expected_LE=first, tokens_per_s=10.0)},
    )
    return DiagnosisInputs(
        placement=placement,
        counts={Phase.DECODE: first},
        later=None if later is None else {Phase.DECODE: later},
        kinds=kinds,
    )


def counts(shares: np.ndarray, seed: int, total: int = 50_000) -> np.ndarray:
    return np.random.default_rng(seed).multinomial(total, shares, size=LAYERS).astype(float)


def skewed(seed: int) -> np.ndarray:
    """Hosts get every fourth expert of a layer: two of those are hot, so one host is twice as busy."""
    shares = np.ones(EXPERTS)
    shares[[seed % 4, seed % 4 + 4]] = 4.0
    return shares / shares.sum()


def test_a_lasting_skew_turns_placement_on() -> None:
    found = diagnose(inputs_of(counts(skewed(0), 0), counts(skewed(0), 1)))

    (phase,) = found.phases
    assert found.scored and phase.persistence is not None and phase.persistence > 0.9
    assert phase.balance_then[0.0] < 0.9 * phase.balance_now
    assert any(line.startswith("placement for decode: on") for line in found.advice)


def test_a_passing_skew_leaves_it_off() -> None:
    found = diagnose(inputs_of(counts(skewed(0), 0), counts(skewed(1), 1)))

    assert any("placement for decode: leave it off" in line and "last" in line for line in found.advice)


def test_even_loads_leave_everything_off() -> None:
    even = np.full(EXPERTS, 1 / EXPERTS)
    kinds = np.stack([counts(even, seed) for seed in range(6)])

    found = diagnose(replace(inputs_of(counts(even, 0), counts(even, 1), kinds), kinds_later=kinds))

    assert any("placement for decode: leave it off" in line for line in found.advice)
    assert any("semantic routing: leave it off" in line for line in found.advice)


def test_a_hot_expert_asks_for_room_for_replicas() -> None:
    shares = np.ones(EXPERTS)
    shares[0] = 14.0
    found = diagnose(inputs_of(counts(shares / shares.sum(), 0), counts(shares / shares.sum(), 1)))

    assert any(line.startswith("replicas for decode: room") for line in found.advice)


def test_kinds_that_use_different_experts_turn_semantic_routing_on() -> None:
    blocks = np.kron(np.eye(4), np.ones(EXPERTS // 4)) + 0.05
    kinds = np.stack([counts(row / row.sum(), seed) for seed, row in enumerate(blocks)])

    found = diagnose(inputs_of(kinds.sum(axis=0), None, kinds))

    assert found.semantic is not None and found.semantic.misses[0.25] < 0.4
    assert any("semantic routing: on" in line for line in found.advice)
    assert not found.scored and found.phases[0].persistence is None


def test_one_host_and_one_worker_have_nothing_to_balance() -> None:
    inputs = inputs_of(counts(skewed(0), 0), None)
    alone = replace(inputs.placement, hosts=inputs.placement.hosts[:1])

    found = diagnose(replace(inputs, placement=alone, num_workers=1))

    assert [("leave it off" in line) for line in found.advice] == [True, True]


def test_kinds_are_dealt_by_likeness_and_evenly() -> None:
    blocks = np.kron(np.eye(2), np.ones(EXPERTS // 2)) + 0.05
    kinds = np.stack([counts(blocks[seed % 2] / blocks[0].sum(), seed) for seed in range(6)])

    worker_of = deal_kinds(kinds, 2)

    assert len(set(worker_of[::2])) == len(set(worker_of[1::2])) == 1
    assert worker_of[0] != worker_of[1]
    assert predicted_misses(kinds, kinds, 1, 0.5) == 1.0


def test_gini() -> None:
    assert gini(np.full(8, 3.0)) == 0.0
    assert gini(np.array([0.0, 0.0, 0.0, 9.0])) == 0.75


@given(
    values=arrays(np.float64, (LAYERS, EXPERTS), elements=st.sampled_from([0.0, 0.0, 1.0, 3.0, 1e6, 1e-9])),
    lost=st.booleans(),
)
@settings(max_examples=40, deadline=None)
def test_no_number_is_impossible_whatever_was_counted(values: np.ndarray, lost: bool) -> None:
    """Layers and experts that nobody used, experts whose host is lost, numbers far apart."""
    inputs = inputs_of(values, None)
    if lost:
        inputs = replace(inputs, placement=replace(inputs.placement, hosts=inputs.placement.hosts[1:]))

    found = diagnose(inputs)

    assert len(found.phases) == int(values.sum() > 0)
    assert found.balance_now is not None and found.balance_now >= 1.0 - 1e-9
    assert found.num_hosts == HOSTS - lost
    for phase in found.phases:
        assert phase.activations == values.sum()
        assert 1.0 - 1e-9 <= phase.max_over_mean <= phase.max_over_mean_worst + 1e-9 <= EXPERTS + 1e-6
        assert 0.0 <= phase.gini < 1.0 and 0.0 <= phase.reliability <= 1.0
        assert phase.balance_now >= 1.0 - 1e-9
        assert all(then >= 1.0 - 1e-9 for then in phase.balance_then.values())
    assert found.balance_now == pytest.approx(plan_placement(inputs.placement).balance_now)


def test_layers_that_nobody_used_do_not_count() -> None:
    values = counts(skewed(0), 0)
    values[1:] = 0.0

    (phase,) = diagnose(inputs_of(values, None)).phases

    assert phase.max_over_mean == pytest.approx(values[0].max() / values[0].mean())
    assert phase.max_over_mean == phase.max_over_mean_worst
    assert phase.gini == pytest.approx(gini(values[0]))


def test_without_anything_counted_no_table_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    empty = diagnose(inputs_of(np.zeros((LAYERS, EXPERTS)), None))
    print_diagnosis(empty.as_dict())
    told = capsys.readouterr().out

    assert "no expert was used yet" in told
    assert not any(char in told for char in "┏┓│┃"), told


def test_workers_without_hosts_are_told_nothing_of_hosts(capsys: pytest.CaptureFixture[str]) -> None:
    alone = inputs_of(counts(skewed(0), 0), None)
    print_diagnosis(diagnose(replace(alone, has_hosts=False, num_workers=1)).as_dict())
    told = capsys.readouterr().out

    assert "experts, max over mean" in told and "hosts" not in told.split("- ")[0]
