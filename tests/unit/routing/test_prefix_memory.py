"""The router's memory of what it sent where: longest prefixes, bounded, forgotten from the end of a prompt."""

from __future__ import annotations

import hypothesis.strategies as st
from hypothesis import given

from cluster.routing.prefix_memory import PrefixMemory, block_hashes


def test_a_block_is_named_by_all_that_is_before_it() -> None:
    one, other = block_hashes(range(40), 16), block_hashes([99, *range(1, 40)], 16)

    assert len(one) == 2
    assert one[0] != other[0] and one[1] != other[1]
    assert block_hashes(range(200), 16)[:2] == one


def test_the_last_token_is_never_taken_from_the_cache() -> None:
    assert block_hashes(range(16), 16) == ()
    assert len(block_hashes(range(17), 16)) == 1
    assert block_hashes([], 16) == ()


def test_every_replica_is_credited_with_its_longest_prefix() -> None:
    memory = PrefixMemory(100)
    memory.note((1, 2, 3), "a")
    memory.note((1, 2), "b")
    memory.note((7,), "c")

    assert memory.num_cached((1, 2, 3, 4)) == {"a": 3, "b": 2}
    assert memory.num_cached((5, 1)) == {}


def test_blocks_behind_a_gap_do_not_count() -> None:
    memory = PrefixMemory(100)
    memory.note((1,), "a")
    memory.note((1, 2, 3), "b")
    memory.note((2, 3), "a")

    assert memory.num_cached((1, 2, 3)) == {"a": 3, "b": 3}
    memory.forget(frozenset({"a"}))
    assert memory.num_cached((1, 2, 3)) == {"b": 3}


def test_a_replica_that_is_gone_is_forgotten() -> None:
    memory = PrefixMemory(100)
    memory.note((1, 2), "a")
    memory.forget(frozenset({"a"}))

    assert memory.num_cached((1, 2)) == {} and len(memory) == 0


@given(st.lists(st.lists(st.integers(0, 30), min_size=1, max_size=8, unique=True)), st.integers(1, 12))
def test_it_stays_bounded_and_keeps_beginnings(prompts: list[list[int]], capacity: int) -> None:
    memory = PrefixMemory(capacity)
    for prompt in prompts:
        memory.note(prompt, "a")
        assert len(memory) <= capacity
        assert memory.num_cached(prompt) == {"a": min(len(prompt), capacity)}
