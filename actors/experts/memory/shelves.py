"""Experts from the memory of other nodes: the link that takes them from shelves into an arena.

Knows what shelves say of themselves, and bytes; knows no Ray (actors/ray_shells/shelf_actor.py) and no policies. Losing
a shelf costs time, never a request: its experts are gone from `has` at once, and whoever wanted one reads it from disk.
"""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actors.experts.memory.arena import RamArena
from cluster.errors import ExpertReadError
from cluster.types import Tier

if TYPE_CHECKING:  # whoever starts shelves gets by without torch
    from actors.weights.slots import SlotForm

_REFRESH_S = 30.0
_FILLING_S = 2.0  # between looks at shelves that are still taking experts in


class RemoteReadError(ExpertReadError):
    """Another node's memory did not give an expert. Never for the client: every expert is on disk, too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ShelfFacts:
    """What a shelf says of itself.

    shelf_id: a new one at every start. form: of its experts (`form_digest`), None while it loads. num_held: experts it
    has so far; it takes in more until `is_complete` and drops none. problem: why it holds fewer than it should, if so.
    """

    shelf_id: str
    node_id: str
    fingerprint: str
    form: str | None
    num_held: int
    is_complete: bool
    problem: str | None


class Shelves(Protocol):
    """The shelves of a cluster. Handles are opaque to the link. Called from several threads."""

    def facts(self) -> Sequence[ShelfFacts]:
        """Of every shelf that answers in time; never raises."""
        ...

    def listing(self, shelf: ShelfFacts, since: int) -> Sequence[tuple[int, object]]:
        """What a shelf took in after its first `since` experts: (flat index, handle), in a fixed order.

        Raises:
            RemoteReadError: it does not answer.
        """
        ...

    def fetch(self, handle: object, timeout_s: float) -> np.ndarray:
        """An expert's bytes [slot_bytes] uint8, without a copy of their own where that is possible.

        Raises:
            RemoteReadError: the node or the object is gone, or slower than `timeout_s`.
        """
        ...


def form_digest(form: SlotForm) -> str:
    """Equal for two processes whose slots hold equal bytes: same matrices, dtype, size and offsets."""
    layout = form.layout
    sizes = (layout.layers, layout.num_experts, layout.hidden, layout.intermediate, form.slot_bytes)
    offsets = [() if form.converts else form.plan(index).part_offsets for index in range(form.grid.size)]
    return hashlib.sha256(repr((sizes, form.held_dtype, form.form, offsets)).encode()).hexdigest()[:16]


@dataclass(slots=True, eq=False)
class _Shelf:
    """entries: all it has listed. failed: what it did not give; while there is such a thing it is not trusted."""

    facts: ShelfFacts
    entries: list[tuple[int, object]] = field(default_factory=list)
    failed: object | None = None


class ShelfLink:
    """Experts on shelves, by a table that is renewed off the token path.

    An expert is one chunk, because Ray moves objects whole: each thread of the queue waits for another expert instead
    of all for the same one, and pins no more copies here than there are threads. Copies no longer pinned stay in this
    node's object store until Ray needs their room: memory of Ray's, which the budgets do not count.
    """

    tier = Tier.REMOTE

    def __init__(
        self,
        shelves: Shelves,
        arena: RamArena,
        *,
        fingerprint: str,
        form: str,
        timeout_s: float,
    ) -> None:
        """Args: form: `form_digest` of what the arena holds. timeout_s: a node that takes longer is not asked again
        before it has proved itself; less than what a load may take in all, or no time is left to read from disk.
        """
        self._shelves = shelves
        self._arena = arena
        self._fingerprint, self._form = fingerprint, form
        self._timeout_s = timeout_s
        self._lock = threading.Lock()
        self._known: dict[str, _Shelf] = {}
        self._table: dict[int, tuple[_Shelf, object]] = {}  # replaced, never changed: `has` reads it without the lock
        self._problems: tuple[str, ...] = ()
        self._is_filling = True
        self._wake = threading.Event()
        self._closed = False
        self._thread = threading.Thread(target=self._keep_fresh, name="expert-shelves", daemon=True)

    @property
    def num_experts(self) -> int:
        """Experts that can be had from other nodes now."""
        return len(self._table)

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong with the shelves, for `status`."""
        return self._problems

    def start(self) -> None:
        """Look for shelves from now on, in a thread of its own."""
        self._thread.start()

    def has(self, index: int) -> bool:
        return index in self._table

    def num_chunks(self, index: int) -> int:
        return 1

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        shelf, handle = self._table.get(index, (None, None))
        if shelf is None:
            raise RemoteReadError(f"expert {index} of the model is in no other node's memory any more")
        try:
            data = self._shelves.fetch(handle, self._timeout_s)
        except RemoteReadError:
            self._distrust(shelf, handle)
            raise
        # numpy copies without the interpreter lock, a memoryview with it
        np.copyto(np.frombuffer(self._arena.view(slot), dtype=np.uint8), data)
        return data.nbytes

    def refresh(self) -> None:
        """Ask the shelves what they have; one that failed is trusted again when it gives what it did not give."""
        problems: list[str] = []
        known: dict[str, _Shelf] = {}
        facts = self._shelves.facts()
        for each in facts:
            shelf = self._known.get(each.shelf_id) or _Shelf(each)
            shelf.facts = each
            refusal = self._refusal(each)
            problems += [text for text in (refusal, each.problem) if text is not None]
            if refusal is None and each.form is not None:
                known[each.shelf_id] = shelf
                problems += self._list(shelf)
        with self._lock:
            if self._closed:
                return
            self._known = known
            self._table = {
                index: (shelf, handle)
                for shelf in known.values()
                if shelf.failed is None
                for index, handle in shelf.entries
            }
        self._problems = tuple(problems)
        self._is_filling = not facts or not all(each.is_complete for each in facts)

    def close(self) -> None:
        """Let go of all shelves; idempotent."""
        with self._lock:
            self._closed = True
            self._table, self._known = {}, {}
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=1.0)  # it may be waiting for a node that is gone; it is a daemon

    def _refusal(self, facts: ShelfFacts) -> str | None:
        where = f"expert shelf on node {facts.node_id}"
        if facts.fingerprint != self._fingerprint:
            return f"{where} holds model {facts.fingerprint}, this is {self._fingerprint}; restart it"
        if facts.form is not None and facts.form != self._form:
            return (
                f"{where} holds experts in form {facts.form}, this process in form {self._form}: "
                "give all nodes the same files and dtype"
            )
        return None

    def _list(self, shelf: _Shelf) -> list[str]:
        """Bring a shelf's entries up to date; what is wrong with it."""
        try:
            if shelf.facts.num_held > len(shelf.entries):
                shelf.entries += self._shelves.listing(shelf.facts, len(shelf.entries))
            if shelf.failed is not None:
                self._shelves.fetch(shelf.failed, self._timeout_s)
                shelf.failed = None
        except RemoteReadError as error:
            return [error.message]
        return []

    def _distrust(self, shelf: _Shelf, handle: object) -> None:
        """Without waiting for the next look: no further load may stall on it."""
        with self._lock:
            shelf.failed = handle
            self._table = {index: entry for index, entry in self._table.items() if entry[0] is not shelf}
        self._wake.set()

    def _keep_fresh(self) -> None:
        while not self._closed:
            self._wake.clear()
            self.refresh()
            self._wake.wait(_FILLING_S if self._is_filling else _REFRESH_S)


def remote_source(
    shelves: Shelves, *, fingerprint: str, load_timeout_s: float
) -> Callable[[SlotForm, RamArena], ShelfLink]:
    """Makes the link into an arena of slots of a form, already looking for shelves.

    Args: load_timeout_s: of an expert in all; half of it is left for the disk when a node does not answer.
    """

    def make(form: SlotForm, arena: RamArena) -> ShelfLink:
        timeout_s = load_timeout_s / 2
        link = ShelfLink(shelves, arena, fingerprint=fingerprint, form=form_digest(form), timeout_s=timeout_s)
        link.start()
        return link

    return make
