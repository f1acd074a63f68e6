"""LRU against a brute-force list of uses."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given, settings

from actors.experts.policies.lru import LruPolicy
from cluster.types import ExpertId

EXPERTS = [ExpertId(layer, expert) for layer in range(2) for expert in range(3)]


@settings(max_examples=40, deadline=None)
@given(
    steps=st.lists(
        st.tuples(
            st.sampled_from(["use", "evict", "choose"]), st.sampled_from(EXPERTS), st.sets(st.sampled_from(EXPERTS))
        )
    )
)
def test_victim_is_the_unpinned_expert_used_longest_ago(steps: list[tuple[str, ExpertId, set[ExpertId]]]) -> None:
    policy = LruPolicy()
    last_use: dict[ExpertId, int] = {}
    for time, (step, expert, pinned) in enumerate(steps):
        if step == "use":
            (policy.on_use if expert in last_use else policy.on_insert)(expert)
            last_use[expert] = time
        elif step == "evict":
            policy.on_evict(expert)
            last_use.pop(expert, None)
        else:
            candidates = [e for e in last_use if e not in pinned]
            assert policy.choose_victim(pinned) == min(candidates, key=lambda e: last_use[e], default=None)


def test_empty_memory_has_no_victim() -> None:
    assert LruPolicy().choose_victim(set()) is None
