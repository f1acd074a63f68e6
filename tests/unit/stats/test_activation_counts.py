"""Sums, differences and balance of activation counts."""

from __future__ import annotations

import pytest

from cluster.stats.activation_counts import Counts, add_counts, copy_counts, load_balance, subtract_counts
from cluster.types import Phase

PREFILL, DECODE = Phase


def test_subtraction_undoes_addition_and_changes_no_argument() -> None:
    first: Counts = {PREFILL: {0: {1: 5}}, DECODE: {2: {3: 7}}}
    second: Counts = {PREFILL: {0: {1: 2, 4: 1}}, DECODE: {9: {0: 3}}}
    total = copy_counts(first)
    add_counts(total, second)

    assert total == {PREFILL: {0: {1: 7, 4: 1}}, DECODE: {2: {3: 7}, 9: {0: 3}}}
    assert subtract_counts(total, second) == {PREFILL: {0: {1: 5, 4: 0}}, DECODE: {2: {3: 7}, 9: {0: 0}}}
    assert subtract_counts(first, second)[PREFILL] == {0: {1: 3}}
    assert first == {PREFILL: {0: {1: 5}}, DECODE: {2: {3: 7}}}


@pytest.mark.parametrize(
    ("counts", "balance"), [([2, 2, 2], 1.0), ([0, 0, 9, 0], 4.0), ([3, 1], 1.5), ([0, 0], None), ([], None)]
)
def test_load_balance_is_the_largest_over_the_mean(counts: list[int], balance: float | None) -> None:
    assert load_balance(counts) == balance
