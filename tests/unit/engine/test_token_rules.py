"""What a client's lists of tokens cost: work once a sequence, and none that grows with them at each token."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
from engine_builders import VOCABULARY, CountingRunner, make_engine, make_request

from actors.engine.token_rules import TokenRules
from cluster.types import SamplingParams


class CountedTuple(tuple[Any, ...]):
    """Counts the entries that are looked at."""

    looked_at = 0

    def __iter__(self) -> Iterator[Any]:
        for entry in super().__iter__():
            CountedTuple.looked_at += 1
            yield entry

    def __contains__(self, key: object) -> bool:
        CountedTuple.looked_at += len(self)
        return super().__contains__(key)


LISTS: dict[str, tuple[Any, ...]] = {
    "allowed_token_ids": (*range(5, VOCABULARY),) * 100,
    "logit_bias": tuple((token, 1.0) for token in range(VOCABULARY)) * 100,
    "bad_words": ((1, 2, 30), (40, 41)) * 1000,
}


@pytest.mark.parametrize("name", sorted(LISTS))
def test_a_list_is_looked_at_before_the_first_token_only(name: str) -> None:
    engine = make_engine(CountingRunner(lambda tokens: 7), eos=())
    engine.add(make_request("a", prompt=(6,), max_tokens=12, **{name: CountedTuple(LISTS[name])}))
    CountedTuple.looked_at = 0

    tokens = [output.token_id for _ in range(12) for output in engine.step()]

    assert len(tokens) == 12
    assert CountedTuple.looked_at == 0


def test_only_words_whose_turn_it_could_be_are_compared() -> None:
    words = CountedTuple((1, 2, last) for last in range(1000))
    rules = TokenRules.of(SamplingParams(max_tokens=1, bad_words=words))
    assert rules is not None

    assert rules.banned((7, 1)) == ()
    assert rules.banned((1, 2)) == tuple(range(1000))
    assert rules.banned((2,)) == ()
    assert rules.banned(()) == ()


def test_words_of_one_token_are_never_drawn_and_longer_ones_not_completed() -> None:
    rules = TokenRules.of(SamplingParams(max_tokens=1, bad_words=((4,), (5, 6), (9, 5, 7), (4,))))
    assert rules is not None

    assert rules.banned((3,)) == (4,)
    assert rules.banned((8, 5)) == (4, 6)
    assert rules.banned((9, 5)) == (4, 6, 7)


def test_ids_that_are_given_more_than_once_count_once() -> None:
    rules = TokenRules.of(SamplingParams(max_tokens=1, allowed_token_ids=(9, 3) * 300_000))

    assert rules is not None and rules.allowed is not None
    assert rules.allowed.tolist() == [3, 9]


def test_a_request_that_says_nothing_of_tokens_has_no_rules() -> None:
    assert TokenRules.of(SamplingParams(max_tokens=1)) is None
