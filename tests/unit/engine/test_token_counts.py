"""Counts follow the tokens one by one."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given, settings

from actors.engine.token_counts import TokenCounts


@settings(max_examples=30, deadline=None)
@given(prompt=st.lists(st.integers(0, 300), max_size=150), generated=st.lists(st.integers(0, 300), max_size=150))
def test_counts_are_those_of_a_counter_at_every_step(prompt: list[int], generated: list[int]) -> None:
    counts = TokenCounts(prompt)
    expected = Counter(dict.fromkeys(prompt, 0))

    for token in [None, *generated]:
        if token is not None:
            counts.add((token,))
            expected[token] += 1
        assert dict(zip(counts.ids.tolist(), counts.generated.tolist(), strict=True)) == dict(expected)
        assert len(set(counts.ids.tolist())) == len(counts.ids)
