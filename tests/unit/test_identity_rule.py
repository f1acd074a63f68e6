"""The identity rule itself: what it excuses, and what it does not."""

from __future__ import annotations

import math
from collections.abc import Sequence

import pytest
import torch
from identity import Case, assert_identical, gate_gap


class FakeReference:
    """Answers 1, 2, 3; its gaps are given."""

    def __init__(self, logit_gap: float, gate_gap: float) -> None:
        self._gaps = (logit_gap, gate_gap)

    def tokens(self, _: Case) -> list[int]:
        return [1, 2, 3]

    def gaps(self, _: Sequence[int]) -> tuple[float, float]:
        return self._gaps


def _judge(num_cases: int, num_other: int, *, logit_gap: float = 1e-6, gate: float = math.inf) -> None:
    cases = [Case(str(i), (5, 6), 3) for i in range(num_cases)]
    answers = [[1, 2, 4] if i < num_other else [1, 2, 3] for i in range(num_cases)]
    assert_identical(FakeReference(logit_gap, gate), cases, answers)  # type: ignore[arg-type]


@pytest.mark.parametrize("num_cases", [1, 16, 499])
def test_a_small_run_may_have_no_near_tie(num_cases: int) -> None:
    _judge(num_cases, 0)
    with pytest.raises(AssertionError, match="1 near-ties"):
        _judge(num_cases, 1)


def test_near_ties_are_counted_per_thousand() -> None:
    _judge(500, 1)
    _judge(1000, 2)
    with pytest.raises(AssertionError, match="2 near-ties in 999"):
        _judge(999, 2)


def test_a_difference_without_a_near_tie_is_wrong_in_a_run_of_any_size() -> None:
    _judge(2000, 1, logit_gap=0.1, gate=1e-6)
    with pytest.raises(AssertionError, match="1 of 2000 sequences differ without a near-tie"):
        _judge(2000, 1, logit_gap=0.1, gate=0.1)


def _gate(*rows: list[float]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64)


def test_only_the_layer_that_parts_first_can_explain_a_difference() -> None:
    tied, wide, exact = _gate([0.5, 0.3, 0.3, 0.1]), _gate([0.5, 0.4, 0.2, 0.1]), _gate([0.5, 0.2, 0.4, 0.1])

    assert gate_gap([tied, wide], [tied, wide], 2) == math.inf  # a tie that changes nothing
    assert gate_gap([tied, wide], [tied, exact], 2) == pytest.approx(0.5)  # the tie is in another layer
    assert gate_gap([_gate([0.5, 0.3, 0.29999, 0.1]), wide], [exact, exact], 2) == pytest.approx(1 / 30000)


def test_every_row_that_parts_has_to_be_tied() -> None:
    ours = _gate([0.5, 0.3, 0.29999, 0.1], [0.5, 0.4, 0.2, 0.1])

    assert gate_gap([ours], [_gate([0.5, 0.2, 0.4, 0.1], [0.5, 0.2, 0.4, 0.1])], 2) == pytest.approx(0.5)
