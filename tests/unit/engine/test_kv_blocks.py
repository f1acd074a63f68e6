"""KV blocks: owned once unless a prefix is shared, reused while they hold something, never lost."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import settings
from hypothesis.stateful import Bundle, RuleBasedStateMachine, consumes, initialize, invariant, multiple, rule

from actors.engine.kv_blocks import KvBlocks

BLOCK = 4


def _take(blocks: KvBlocks, num: int) -> list[int]:
    taken = [blocks.allocate() for _ in range(num)]
    assert None not in taken
    return [block for block in taken if block is not None]


def _cache(blocks: KvBlocks, tokens: list[int]) -> list[int]:
    """Compute `tokens`, publish and release them: their blocks are free and hold them."""
    owned = _take(blocks, blocks.blocks_for(len(tokens)))
    blocks.publish(tokens, owned, len(tokens))
    blocks.release(owned)
    return owned


def test_every_block_but_zero_is_given_out_once() -> None:
    blocks = KvBlocks(9, BLOCK)

    taken = _take(blocks, 8)

    assert sorted(taken) == list(range(1, 9))
    assert blocks.allocate() is None
    assert (blocks.num_free, blocks.num_used) == (0, 8)


def test_blocks_for_rounds_up() -> None:
    blocks = KvBlocks(9, BLOCK)

    assert [blocks.blocks_for(n) for n in (0, 1, 4, 5, 8, 9)] == [0, 1, 1, 2, 2, 3]


def test_released_block_is_free_again_only_when_nobody_holds_it() -> None:
    blocks = KvBlocks(9, BLOCK)
    tokens = list(range(9))
    owned = _take(blocks, 3)
    blocks.publish(tokens, owned, 9)
    shared = blocks.match_prefix(tokens)

    blocks.release(owned)

    assert shared == owned[:2]
    assert blocks.num_used == 2
    blocks.release(shared)
    assert blocks.num_used == 0


def test_prefix_is_found_after_its_owner_left() -> None:
    blocks = KvBlocks(9, BLOCK)
    owned = _cache(blocks, list(range(8)))

    assert blocks.match_prefix([*range(8), 99]) == owned
    assert blocks.match_prefix([*range(4), 7, 7, 7, 7, 99]) == owned[:1]
    assert blocks.match_prefix([1, *range(1, 8), 99]) == []


def test_match_leaves_at_least_one_token_to_compute() -> None:
    blocks = KvBlocks(9, BLOCK)
    owned = _cache(blocks, list(range(8)))

    assert blocks.match_prefix(list(range(8))) == owned[:1]
    assert blocks.match_prefix(list(range(4))) == []


def test_equal_block_after_another_prefix_is_not_matched() -> None:
    blocks = KvBlocks(9, BLOCK)
    _cache(blocks, [1, 1, 1, 1, 5, 6, 7, 8])

    assert blocks.match_prefix([2, 2, 2, 2, 5, 6, 7, 8, 9]) == []
    assert blocks.match_prefix([5, 6, 7, 8, 9]) == []


def test_partial_and_uncomputed_blocks_are_not_published() -> None:
    blocks = KvBlocks(9, BLOCK)
    tokens = list(range(12))
    owned = _take(blocks, 3)

    published = blocks.publish(tokens, owned, 7)

    assert published[0] == 4
    found = blocks.match_prefix(tokens)
    assert found == owned[:1]


def test_publishing_in_pieces_equals_publishing_at_once() -> None:
    blocks = KvBlocks(17, BLOCK)
    tokens = list(range(13))
    owned = _take(blocks, 4)

    state = (0, b"")
    for computed in (3, 5, 9, 13):
        state = blocks.publish(tokens, owned, computed, *state)

    assert state == KvBlocks(17, BLOCK).publish(tokens, owned, 13)
    assert blocks.match_prefix(tokens) == owned[:3]


def test_second_copy_of_a_published_prefix_goes_back_to_the_empty_blocks() -> None:
    blocks = KvBlocks(5, BLOCK)
    first, second = _take(blocks, 1), _take(blocks, 1)
    for owned in (first, second):
        blocks.publish([1, 2, 3, 4], owned, 4)

    blocks.release(first)
    blocks.release(second)

    assert _take(blocks, 3)
    assert blocks.match_prefix([1, 2, 3, 4, 5]) == first


def test_empty_blocks_are_used_before_cached_ones_and_oldest_cache_goes_first() -> None:
    blocks = KvBlocks(5, BLOCK)
    old, new = _cache(blocks, [1, 1, 1, 1]), _cache(blocks, [2, 2, 2, 2])

    assert not set(_take(blocks, 2)) & {*old, *new}
    assert _take(blocks, 1) == old
    assert blocks.match_prefix([1, 1, 1, 1, 0]) == []
    assert blocks.match_prefix([2, 2, 2, 2, 0]) == new


def test_long_prefix_loses_its_end_before_its_start() -> None:
    blocks = KvBlocks(4, BLOCK)
    owned = _cache(blocks, list(range(12)))

    assert _take(blocks, 1) == [owned[2]]
    assert blocks.match_prefix([*range(12), 0]) == owned[:2]


def test_reused_block_is_no_longer_found_under_its_old_content() -> None:
    blocks = KvBlocks(2, BLOCK)
    (block,) = _cache(blocks, [1, 2, 3, 4])

    (again,) = _take(blocks, 1)
    blocks.publish([5, 6, 7, 8], [again], 4)
    blocks.release([again])

    assert again == block
    assert blocks.match_prefix([1, 2, 3, 4, 0]) == []
    assert blocks.match_prefix([5, 6, 7, 8, 0]) == [block]


class KvBlocksMachine(RuleBasedStateMachine):
    """Sequences over a tiny alphabet come, are computed, and leave in any order; a model says what each block holds."""

    sequences = Bundle("sequences")

    @initialize(num=st.integers(2, 12))
    def start(self, num: int) -> None:
        self.blocks = KvBlocks(num, BLOCK)
        self.total = num - 1
        self.owners: dict[int, list[int]] = {}
        self.content: dict[int, tuple[int, ...]] = {}
        self.matched: dict[int, int] = {}
        self.next_key = 0

    @rule(target=sequences, tokens=st.lists(st.integers(0, 1), min_size=1, max_size=20))
    def admit(self, tokens: list[int]) -> object:
        found = self.blocks.match_prefix(tokens)
        for i, block in enumerate(found):
            assert self.content[block] == tuple(tokens[: (i + 1) * BLOCK]), "a matched block holds another prefix"
        needed = self.blocks.blocks_for(len(tokens)) - len(found)
        if needed > self.blocks.num_free:
            self.blocks.release(found)
            return multiple()
        fresh = _take(self.blocks, needed)
        held = {block for owned in self.owners.values() for block in owned}
        assert not held & set(fresh), "a block in use was given out"
        assert len(set(found + fresh)) == len(found) + len(fresh)
        for i, block in enumerate(fresh, start=len(found)):
            self.content[block] = tuple(tokens[: (i + 1) * BLOCK])
        self.blocks.publish(tokens, found + fresh, len(tokens))
        key = self.next_key
        self.next_key += 1
        self.owners[key] = found + fresh
        self.matched[key] = len(found)
        return key

    @rule(key=consumes(sequences))
    def leave(self, key: int) -> None:
        self.blocks.release(self.owners.pop(key))

    @invariant()
    def nothing_is_lost(self) -> None:
        used = Counter(block for owned in self.owners.values() for block in owned)
        assert self.blocks.num_used == len(used)
        assert self.blocks.num_used + self.blocks.num_free == self.total
        assert 0 not in used

    def teardown(self) -> None:
        if not hasattr(self, "blocks"):
            return
        for owned in self.owners.values():
            self.blocks.release(owned)
        assert self.blocks.num_free == self.total
        assert sorted(_take(self.blocks, self.total)) == list(range(1, self.total + 1))


TestKvBlocksUnderRandomUse = KvBlocksMachine.TestCase
TestKvBlocksUnderRandomUse.settings = settings(max_examples=15, stateful_step_count=25, deadline=None)
