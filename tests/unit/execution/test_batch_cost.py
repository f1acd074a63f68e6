"""What batches cost is told apart into experts and rows where batches differ, and put down to experts where not."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from cluster.execution.batch_cost import BatchCost


@settings(max_examples=60, deadline=None)
@given(expert_s=st.floats(1e-5, 1e-2), ratio=st.floats(0.01, 1.0), seed=st.integers(0, 1000))
def test_costs_are_found_from_batches_of_both_kinds(expert_s: float, ratio: float, seed: int) -> None:
    row_s, cost = ratio * expert_s, BatchCost()
    for turn in range(60):
        num_experts = 1 + (seed + 7 * turn) % 16
        num_rows = num_experts * (1 + (seed + 3 * turn) % 11)
        cost.observe(num_experts, num_rows, num_experts * expert_s + num_rows * row_s)

    mixed = 8 * expert_s + 40 * row_s
    assert 8 * cost.expert_s + 40 * cost.row_s == pytest.approx(mixed, rel=0.1)
    assert cost.expert_s >= 0 and cost.row_s >= 0


def test_batches_that_are_all_alike_are_put_down_to_experts() -> None:
    cost = BatchCost()
    for _ in range(100):
        cost.observe(4, 4, 4e-3)

    assert cost.expert_s + cost.row_s == pytest.approx(1e-3, rel=0.02)
    assert cost.row_s < 0.1 * cost.expert_s


def test_what_was_long_ago_is_forgotten() -> None:
    cost = BatchCost()
    for seconds in (1e-3, 5e-3):
        for turn in range(500):
            cost.observe(1 + turn % 5, 3 * (1 + turn % 5), seconds * (1 + turn % 5))

    assert cost.expert_s + 3 * cost.row_s == pytest.approx(5e-3, rel=0.05)


def test_nothing_is_known_before_the_first_batch() -> None:
    assert (BatchCost().expert_s, BatchCost().row_s) == (0.0, 0.0)
