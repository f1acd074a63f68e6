"""The ring: nearer layers first, as many as fit, what is pinned stays; only large steps get one."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from cluster.policies.ring import RingPlan, uses_nearly_all
from cluster.policies.signals import Grid

GRID = Grid((0, 1, 2, 5), 8, 2)


@given(num_slots=st.integers(1, GRID.size), row=st.integers(-1, GRID.num_layers - 1), seed=st.integers(0, 99))
def test_nothing_pushes_out_what_is_needed_sooner(num_slots: int, row: int, seed: int) -> None:
    values = np.random.default_rng(seed).random(GRID.size)
    plan = RingPlan(GRID, num_slots, values)

    outlook = plan.outlook(row)

    layer = np.arange(GRID.size) // GRID.num_experts
    passing = (outlook.ahead > 0) & ~plan.pinned
    assert passing.sum() <= plan.num_ring_slots
    assert plan.pinned.sum() + plan.num_ring_slots <= max(num_slots, 1)
    assert (layer[outlook.ahead > 0] > row).all(), "only what is still to come in this step"
    assert set(np.flatnonzero(outlook.below > 0)) == set(np.flatnonzero(layer > row)), "below it all of that"
    for one, other in ((a, b) for a in np.flatnonzero(passing)[:4] for b in np.flatnonzero(passing)[-4:]):
        if layer[one] < layer[other]:
            assert outlook.ahead[one] > outlook.ahead[other]
            assert outlook.scores[one] > outlook.scores[other]
    if plan.pinned.any() and not plan.pinned.all():
        assert outlook.scores[plan.pinned].min() > outlook.scores[~plan.pinned].max()
        assert values[plan.pinned].min() >= np.sort(values)[-plan.pinned.sum()]


def test_the_layer_that_has_just_passed_leaves_first() -> None:
    """The last layer is pinned; of the others the next one stays longest."""
    scores = RingPlan(GRID, 16, np.arange(GRID.size)).outlook(1).scores.reshape(4, 8)

    assert (scores == scores[:, :1]).all()
    assert np.argsort(scores[:, 0]).tolist() == [1, 0, 2, 3]


@pytest.mark.parametrize(("rows", "expected"), [(1, False), (4, False), (16, True), (512, True)])
def test_only_large_steps(rows: int, expected: bool) -> None:
    assert uses_nearly_all(GRID, rows) is expected
