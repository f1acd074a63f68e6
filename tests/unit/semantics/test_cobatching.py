"""Co-batching: who shares experts with the running ones joins first, nobody waits for ever, without knowledge FIFO."""

from __future__ import annotations

from dataclasses import dataclass

import hypothesis.strategies as st
import numpy as np
from hypothesis import given
from knowledge_builders import embedding_of, make_knowledge

from cluster.semantics.co_batching import CoBatching


@dataclass
class Item:
    expected: np.ndarray | None
    overtaken: int = 0


def _uses(*experts: int) -> np.ndarray:
    uses = np.zeros((1, 8), dtype=np.float32)
    uses[0, list(experts)] = 0.9
    return uses


def test_who_shares_experts_with_the_running_ones_joins_first() -> None:
    co_batching = CoBatching()
    waiting = [Item(_uses(4, 5)), Item(_uses(0, 1)), Item(_uses(1, 2))]

    assert co_batching.choose(waiting, [Item(_uses(0, 1))]) == 1
    assert co_batching.choose(waiting, [Item(_uses(4, 6)), Item(_uses(5))]) == 0


def test_first_come_first_served_among_equals_and_where_nothing_is_known() -> None:
    co_batching = CoBatching()
    waiting = [Item(_uses(1)), Item(_uses(2)), Item(_uses(1))]

    assert co_batching.choose(waiting, [Item(_uses(0))]) == 0
    assert co_batching.choose(waiting, []) == 0
    assert co_batching.choose([Item(None), Item(None)], [Item(None)]) == 0


def test_expectations_follow_the_knowledge() -> None:
    co_batching = CoBatching()
    assert co_batching.expect(embedding_of(0), 0) is None

    co_batching.set_knowledge(make_knowledge(np.stack([_uses(0, 1), _uses(2, 3)])))

    likeliest = [np.argsort(-np.asarray(co_batching.expect(embedding_of(kind), 0))[0])[:2] for kind in (0, 1)]
    assert [set(experts.tolist()) for experts in likeliest] == [{0, 1}, {2, 3}]
    assert np.allclose(co_batching.expect(b"", 0), [[0.45] * 4 + [0.0] * 4], atol=0.01)


@given(
    st.integers(1, 5),
    st.lists(st.lists(st.integers(0, 7), min_size=1, max_size=3), min_size=1, max_size=60),
    st.integers(2, 8),
)
def test_nobody_is_overtaken_more_often_than_the_bound(
    bound: int, arrivals: list[list[int]], queue_length: int
) -> None:
    """One slot, a queue that is kept full by ever new arrivals: every admission is chosen among them."""
    co_batching = CoBatching(max_overtaken=bound)
    running = [Item(_uses(0, 1, 2))]
    items = [Item(_uses(*experts)) for experts in arrivals]
    waiting: list[int] = []
    overtaken_by = [0] * len(items)
    for number in range(len(items)):
        waiting.append(number)
        if len(waiting) < queue_length:
            continue
        queue = [items[other] for other in waiting]
        place = co_batching.choose(queue, running)
        co_batching.admit(queue, place)
        for other in waiting[:place]:
            overtaken_by[other] += 1
        running = [items[waiting.pop(place)]]

    assert max(overtaken_by) <= bound
