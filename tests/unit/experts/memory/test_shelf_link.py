"""The link to other nodes' memory: what it has, what it copies, and what it does when a node is lost. No Ray."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
from live_server import poll

from actors.experts.memory.arena import RamArena
from actors.experts.memory.shelves import RemoteReadError, ShelfFacts, ShelfLink
from cluster.errors import ExpertReadError

SLOT = 4096
FACTS = ShelfFacts(
    shelf_id="s1", node_id="n1", fingerprint="model", form="form", num_held=0, is_complete=True, problem=None
)


@dataclass
class _Shelf:
    facts: ShelfFacts
    experts: list[int]


@dataclass
class FakeShelves:
    """Handles are (shelf id, index); an expert's bytes are its index. Shelves in `dead` answer, but give nothing."""

    shelves: list[_Shelf] = field(default_factory=list)
    dead: set[str] = field(default_factory=set)
    calls: list[str] = field(default_factory=list)
    on_fetch: Callable[[], None] = lambda: None

    def add(self, experts: list[int], **changes: object) -> _Shelf:
        shelf = _Shelf(replace(FACTS, num_held=len(experts), **changes), experts)  # type: ignore[arg-type]
        self.shelves.append(shelf)
        return shelf

    def facts(self) -> Sequence[ShelfFacts]:
        return [replace(shelf.facts, num_held=len(shelf.experts)) for shelf in self.shelves]

    def listing(self, shelf: ShelfFacts, since: int) -> Sequence[tuple[int, object]]:
        self.calls.append(f"list {shelf.shelf_id} from {since}")
        found = next(each for each in self.shelves if each.facts.shelf_id == shelf.shelf_id)
        return [(index, (shelf.shelf_id, index)) for index in found.experts[since:]]

    def fetch(self, handle: object, timeout_s: float) -> np.ndarray:
        assert isinstance(handle, tuple)
        self.calls.append(f"fetch {handle[1]} from {handle[0]}")
        self.on_fetch()
        if handle[0] in self.dead:
            raise RemoteReadError(f"node of {handle[0]} is gone")
        return np.full(SLOT, handle[1], dtype=np.uint8)


def make_link(shelves: FakeShelves, arena: RamArena | None = None) -> ShelfLink:
    return ShelfLink(shelves, arena or RamArena(2, SLOT), fingerprint="model", form="form", timeout_s=1.0)


@contextmanager
def started(link: ShelfLink) -> Iterator[ShelfLink]:
    link.start()
    try:
        yield link
    finally:
        link.close()


def test_an_expert_is_copied_whole_into_its_slot_and_no_further() -> None:
    shelves, arena = FakeShelves(), RamArena(3, SLOT)
    shelves.add([7])
    link = make_link(shelves, arena)
    link.refresh()

    moved = sum(link.copy_chunk(7, chunk, 1) for chunk in range(link.num_chunks(7)))

    assert moved == SLOT
    assert [set(arena.view(slot)) for slot in range(3)] == [{0}, {7}, {0}]


def test_what_is_on_no_shelf_is_not_had_and_says_so() -> None:
    link = make_link(FakeShelves())
    link.refresh()

    assert not link.has(3)
    with pytest.raises(RemoteReadError, match="expert 3 "):
        link.copy_chunk(3, 0, 0)
    assert issubclass(RemoteReadError, ExpertReadError), "a transfer queue hands it on like any other"


def test_a_filling_shelf_is_listed_from_where_the_last_listing_ended() -> None:
    shelves = FakeShelves()
    shelf = shelves.add([4, 9], is_complete=False)
    link = make_link(shelves)
    link.refresh()
    shelf.experts += [1]
    link.refresh()
    link.refresh()

    assert [link.has(index) for index in (4, 9, 1, 0)] == [True, True, True, False]
    assert shelves.calls == ["list s1 from 0", "list s1 from 2"]


def test_a_lost_node_takes_all_its_experts_with_it_at_the_first_failure_and_no_others() -> None:
    shelves = FakeShelves(dead={"s1"})
    shelves.add([0, 1, 2])
    shelves.add([3], shelf_id="s2", node_id="n2")
    link = make_link(shelves)
    link.refresh()

    with pytest.raises(RemoteReadError, match="gone"):
        link.copy_chunk(1, 0, 0)

    assert [index for index in range(4) if link.has(index)] == [3]
    assert link.copy_chunk(3, 0, 0) == SLOT


def test_a_node_is_trusted_again_only_when_it_gives_what_it_did_not_give() -> None:
    shelves = FakeShelves(dead={"s1"})
    shelves.add([0, 1])
    link = make_link(shelves)
    link.refresh()
    with pytest.raises(RemoteReadError):
        link.copy_chunk(1, 0, 0)

    link.refresh()
    assert not link.has(0), "it answers calls, but its objects do not come"
    assert any("gone" in problem for problem in link.problems)
    shelves.dead.clear()
    link.refresh()

    assert link.has(0) and link.has(1)
    assert link.problems == ()
    assert shelves.calls.count("list s1 from 0") == 1, "what it had listed is still known"


def test_a_shelf_that_was_restarted_is_another_one() -> None:
    shelves = FakeShelves()
    shelves.add([0, 1])
    link = make_link(shelves)
    link.refresh()
    shelves.shelves.clear()
    shelves.add([5], shelf_id="s1b")
    link.refresh()

    assert [index for index in range(6) if link.has(index)] == [5]
    assert link.copy_chunk(5, 0, 0) == SLOT
    assert shelves.calls[-1] == "fetch 5 from s1b"


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"fingerprint": "other"}, "n1 holds model other, this is model"),
        ({"form": "wide"}, "n1 holds experts in form wide, this process in form form"),
    ],
)
def test_a_shelf_of_another_model_or_form_is_refused_with_both(changes: dict[str, str], said: str) -> None:
    shelves = FakeShelves()
    shelves.add([0], **changes)
    link = make_link(shelves)
    link.refresh()

    assert not link.has(0)
    assert shelves.calls == [], "nothing is taken from it"
    assert [said in problem for problem in link.problems] == [True]


def test_a_shelf_that_still_loads_is_neither_used_nor_a_problem() -> None:
    shelves = FakeShelves()
    shelves.add([], form=None, is_complete=False)
    link = make_link(shelves)
    link.refresh()

    assert link.problems == ()
    assert link.num_experts == 0


def test_why_a_shelf_holds_less_is_handed_on() -> None:
    shelves = FakeShelves()
    shelves.add([0], problem="the store is small")
    link = make_link(shelves)
    link.refresh()

    assert link.has(0)
    assert link.problems == ("the store is small",)


def test_a_failure_makes_the_thread_look_again_at_once() -> None:
    shelves = FakeShelves(dead={"s1"})
    shelves.add([0])

    def recover_for_the_probe() -> None:
        if shelves.calls.count("fetch 0 from s1") == 2:
            shelves.dead.clear()

    shelves.on_fetch = recover_for_the_probe
    with started(make_link(shelves)) as link:
        poll(lambda: link.has(0), deadline_s=5, what="the table")
        with pytest.raises(RemoteReadError):
            link.copy_chunk(0, 0, 0)
        poll(lambda: link.has(0), deadline_s=5, what="trust, long before the next look of its own")


def test_after_close_nothing_is_had_even_if_a_look_was_under_way() -> None:
    shelves = FakeShelves()
    shelves.add([0])
    link = make_link(shelves)
    link.refresh()
    link.close()
    link.refresh()

    assert not link.has(0)
    link.close()
