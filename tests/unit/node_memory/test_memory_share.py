"""How the node's memory is shared out: pure numbers."""

from __future__ import annotations

import random

import pytest

from cluster.node_memory.share import LeaseFacts, MemoryLevel, fair_share, is_within, open_bytes, unpromised_bytes


def lease(open_bytes: int, *, group: str = "/", family: str = "m", is_settled: bool = True) -> LeaseFacts:
    return LeaseFacts(group=group, family=family, open_bytes=open_bytes, is_settled=is_settled)


def test_what_others_will_still_fill_is_not_free() -> None:
    levels = (MemoryLevel("", 1000),)

    assert unpromised_bytes(levels, ()) == 1000
    assert unpromised_bytes(levels, (lease(300), lease(200))) == 500
    assert unpromised_bytes(levels, (lease(3000),)) == 0


def test_a_limit_counts_only_leases_of_its_group_and_below() -> None:
    levels = (MemoryLevel("", 1000), MemoryLevel("/a", 600))

    assert unpromised_bytes(levels, (lease(300, group="/b"),)) == 600
    assert unpromised_bytes(levels, (lease(300, group="/a/x"),)) == 300
    assert unpromised_bytes(levels, (lease(300, group="/ab"),)) == 600


@pytest.mark.parametrize(("now", "left"), [(100, 50), (120, 30), (150, 0), (900, 0), (20, 50)])
def test_a_promise_shrinks_as_its_process_fills_it(now: int, left: int) -> None:
    assert open_bytes(promised=50, before=100, now=now) == left


def test_those_that_have_not_asked_get_as_much() -> None:
    assert fair_share(1000, (), family="m") == 700
    assert fair_share(1000, (lease(0, is_settled=False),), family="m") == 350
    assert fair_share(1000, (), family="m", expected=2) == 350, "the other has not come yet"
    assert fair_share(1000, (lease(0),), family="m", expected=2) == 700, "it has what it wants"
    assert fair_share(1000, (lease(0, family="other"),), family="m", expected=2) == 350


def test_any_number_of_processes_in_any_order_promise_no_more_than_is_free() -> None:
    draw = random.Random(5)
    for _ in range(300):
        free, count = draw.randrange(10**6, 10**9), draw.randrange(1, 9)
        taken: list[int] = []
        for index in range(count):
            pending = draw.randrange(count - index)
            others = (*(lease(each) for each in taken), *(lease(0, is_settled=False) for _ in range(pending)))
            left = unpromised_bytes((MemoryLevel("", free),), others)
            taken.append(fair_share(left, others, family="m", expected=count))
        assert sum(taken) <= free
        assert min(taken) * 4 > max(taken), f"{taken} of {free}"


def test_the_root_is_above_every_group() -> None:
    assert is_within("/a/b", "") and is_within("/a/b", "/") and is_within("/a/b", "/a/b")
    assert not is_within("/a", "/a/b")
