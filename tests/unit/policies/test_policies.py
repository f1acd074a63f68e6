"""The order of eviction: against a brute-force list of uses where all are worth the same, and by scores."""

from __future__ import annotations

import hypothesis.strategies as st
import numpy as np
from hypothesis import given, settings

from cluster.policies.eviction.eviction_order import EvictionOrder
from cluster.policies.eviction.frequency import StaticScorer
from cluster.policies.eviction.lru import LruScorer

SIZE = 6


def _mask(*indices: int) -> np.ndarray:
    kept = np.zeros(SIZE, dtype=np.bool_)
    kept[list(indices)] = True
    return kept


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["use", "evict", "choose"]), st.integers(0, SIZE - 1), st.sets(st.integers(0, SIZE - 1))
        )
    )
)
def test_lru_victim_is_the_unpinned_expert_used_longest_ago(steps: list[tuple[str, int, set[int]]]) -> None:
    order = EvictionOrder(LruScorer(SIZE), SIZE)
    last_use: dict[int, int] = {}
    for time, (step, expert, pinned) in enumerate(steps):
        if step == "use":
            order.touch((expert,)) if expert in last_use else order.on_insert(expert)
            last_use[expert] = time
        elif step == "evict":
            order.on_evict(expert)
            last_use.pop(expert, None)
        else:
            candidates = [e for e in last_use if e not in pinned]
            assert order.victim(_mask(*pinned)) == min(candidates, key=lambda e: last_use[e], default=None)


def test_empty_memory_has_no_victim() -> None:
    assert EvictionOrder(LruScorer(SIZE), SIZE).victim() is None


def test_lowest_score_leaves_first_and_never_a_kept_or_absent_one() -> None:
    order = EvictionOrder(StaticScorer(np.array([[3.0, 1, 0], [0, 0, 2]])), SIZE)
    for index in (0, 1, 5):
        order.on_insert(index)

    assert order.victim() == 1
    assert order.victim(_mask(1)) == 5
    assert order.victim(_mask(0, 1, 5)) is None
    order.on_evict(1)
    assert order.victim() == 5


def test_equal_scores_leave_in_the_order_of_their_last_use() -> None:
    order = EvictionOrder(StaticScorer(np.zeros((2, 3))), SIZE)
    order.on_insert(0)
    order.on_insert(4)

    order.touch((0,))

    assert order.victim() == 4
