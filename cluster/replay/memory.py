"""The expert memory of a replay: demand loads and prefetch over one link, in virtual time.

Obeys the rules of the live memory: demand goes before prefetch and waits for at most one chunk, a load always finds a
slot, what is needed now is not evicted, fetches that are no longer wanted are dropped. Experts are flat indices of the
grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from cluster.policies.base import Scorer
from cluster.policies.prefetch.base import Forecast
from cluster.policies.residency import ABSENT, PREFETCHED, Lookup, Residency
from cluster.policies.signals import Grid
from cluster.replay.link import CHUNKS_PER_EXPERT, ReplayLink


@dataclass(slots=True)
class ReplayCounters:
    """Chunks and experts since start.

    used: fetched ahead, complete, and then used before they left. wasted: fetched ahead, complete, and evicted unused
    (or unused at the end). dropped_chunks: of fetches given up half way.
    """

    demand_chunks: int = 0
    prefetch_chunks: int = 0
    dropped_chunks: int = 0
    used: int = 0
    wasted: int = 0


class WantedExperts:
    """A forecast by priority, ranked once for all memories that follow it. priority: [L * E]."""

    def __init__(self, forecast: Forecast) -> None:
        self.priority = forecast.priority.reshape(-1)
        self._ranked: list[int] | None = None

    def ranked(self) -> list[int]:
        """Experts of a priority above 0, the first to be fetched first."""
        ranked = self._ranked
        if ranked is None:
            wanted = (self.priority > 0).nonzero()[0]
            ranked = self._ranked = [int(i) for i in wanted[(-self.priority[wanted]).argsort(kind="stable")]]
        return ranked


class ReplayMemory:
    """A memory whose bytes move in virtual time. residents: who is where, in the class of the live memory."""

    def __init__(self, grid: Grid, scorer: Scorer, link: ReplayLink, num_slots: int) -> None:
        self.counters = ReplayCounters()
        self.link = link
        self.residents = Residency(grid, scorer, num_slots)
        self._chunks: dict[int, int] = {}  # of fetches ahead that are not complete
        self._landing: tuple[int, float] | None = None  # the fetch whose last chunk is on the link, and its end
        self._wanted: WantedExperts | None = None
        self._next = 0  # of the ranked experts, the first that was not looked at
        self._needed: set[int] = set()  # now; they are held

    def begin_layer(self, needed: Sequence[int]) -> Lookup:
        """These experts are needed now, instead of those before, and the resident ones are used at once.

        Returns places in `needed`.
        """
        residents = self.residents
        residents.release(self._needed)
        self._needed = set(needed)
        residents.hold(needed)
        found = residents.lookup(needed)
        residents.touch([needed[k] for k in found.hits])
        residents.make_room(len(found.missing))
        return found

    def unpin(self, indices: Sequence[int]) -> None:
        """These were computed; their slots may go to others."""
        done = self._needed.intersection(indices)
        self.residents.release(done)
        self._needed -= done

    def load(self, index: int, now_s: float) -> float | None:
        """Fetch an expert that is waited for; when it is there. None: no slot, everything is needed."""
        begun = self._chunks.pop(index, 0)
        if self._lands(index):
            assert self._landing is not None
            arrives_s = self._landing[1]
            self._landing = None
        else:
            if not begun and not self._prepare(index):
                return None
            missing = CHUNKS_PER_EXPERT - begun
            self.counters.demand_chunks += missing
            arrives_s = self.link.send(missing, asked_s=now_s, is_demand=True)
        self.residents.complete(index, prefetched=False)
        return arrives_s

    def want(self, wanted: WantedExperts | None, now_s: float) -> None:
        """Replace what is fetched ahead; what was begun and is no longer wanted is given up."""
        self.link.busy_until_s = max(self.link.busy_until_s, now_s)
        self._wanted, self._next = wanted, 0
        for index in list(self._chunks):
            if (wanted is None or wanted.priority[index] <= 0) and not self._lands(index):
                self._drop(index)

    def run_until(self, now_s: float) -> None:
        """Let time pass: chunks of fetches ahead begin while the link is free before `now_s`."""
        if self._landing is not None:
            self._land(now_s)
        while self._landing is None and self.link.busy_until_s < now_s:
            index = next(iter(self._chunks), None)
            if index is None:
                index = self._begin_next()
                if index is None:
                    return
            self.counters.prefetch_chunks += 1
            self._chunks[index] += 1
            end_s = self.link.send(1, asked_s=self.link.busy_until_s, is_demand=False)
            if self._chunks[index] == CHUNKS_PER_EXPERT:
                self._landing = (index, end_s)
                self._land(now_s)

    def finish(self) -> None:
        """The replay is over: what was fetched ahead and never used was wasted."""
        residents, counters = self.residents, self.counters
        counters.used = int(residents.num_used.sum())
        counters.wasted = int(residents.num_wasted.sum()) + int((residents.state == PREFETCHED).sum())
        for index in list(self._chunks):
            self._drop(index)

    def _land(self, now_s: float) -> None:
        if self._landing is not None and self._landing[1] <= now_s:
            index = self._landing[0]
            self._landing = None
            del self._chunks[index]
            self.residents.complete(index, prefetched=True)

    def _lands(self, index: int) -> bool:
        return self._landing is not None and self._landing[0] == index

    def _begin_next(self) -> int | None:
        """Give the best of the wanted a slot; None when nothing is wanted, or nothing wanted less can leave."""
        if self._wanted is None:
            return None
        ranked, priority = self._wanted.ranked(), self._wanted.priority
        while self._next < len(ranked):
            index = ranked[self._next]
            self._next += 1
            if self.residents.states[index] != ABSENT:
                continue
            # Nothing that is needed now leaves, nor anything that the same forecast wants as much.
            if not self.residents.prepare(index, priority >= priority[index]):
                self._wanted = None
                return None
            self._chunks[index] = 0
            return index
        return None

    def _prepare(self, index: int) -> bool:
        """Give a demand a slot: a free one, a victim's, or that of a fetch ahead."""
        if self.residents.prepare(index):
            return True
        if not self._chunks:
            return False
        self._drop(next(iter(self._chunks)))
        return self.residents.prepare(index)

    def _drop(self, index: int) -> None:
        self.counters.dropped_chunks += self._chunks.pop(index)
        if self._lands(index):
            self._landing = None
        self.residents.abandon(index)
