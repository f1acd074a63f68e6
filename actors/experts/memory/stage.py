"""One arena of an expert memory with everything about it: who is in it, the links into it, their queue, its wishes.

Moves bytes as the residency of its experts (cluster/policies/residency.py) says. Knows experts as indices, slots and
transfers; knows nothing of layers or steps. The store's lock guards it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from actors.experts.memory.arena import RamArena
from actors.experts.memory.backoff import ReadBackoff
from actors.experts.memory.counters import MemoryCounters
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.transfers import ExpertTransfer, TransferQueue
from cluster.errors import ExpertReadError
from cluster.policies.residency import ABSENT, Residency


class MemoryStage:
    """An arena and the way into it.

    links: in the order of preference. below: the stage that its link reads from, if that is an arena. priority: [N],
    what is to be prefetched. fills_up: free slots take what is worth most, wanted or not. backoff: prefetches that
    ended in an error, and when they may be tried again. failed: those that were not tried again since something was
    last wanted. num_dropped: [L] int64, loads given up before they were complete, since start.
    """

    def __init__(
        self,
        name: str,
        arena: RamArena,
        residents: Residency,
        links: Sequence[MemoryLink],
        *,
        lock: threading.Lock,
        num_threads: int,
        counters: MemoryCounters,
        done: Callable[[MemoryStage, ExpertTransfer], None],
        backoff: ReadBackoff,
        below: MemoryStage | None = None,
        fills_up: bool = False,
        bytes_per_s: float = 0.0,
    ) -> None:
        """Args: bytes_per_s: of an emulated link. done: told, under the lock and by a thread of the queue, when a
        transfer has ended for good and its expert is complete or absent."""
        self.arena = arena
        self.residents = residents
        self.links = tuple(links)
        self.below = below
        self.fills_up = fills_up
        self.priority: np.ndarray | None = None
        self.backoff = backoff
        self.failed: dict[int, ExpertReadError] = {}
        self.num_dropped = np.zeros_like(residents.num_used)
        self._num_experts = residents.state.shape[1]
        self._counters, self._done = counters, done
        self.queue = TransferQueue(
            f"experts-to-{name}",
            lock,
            num_threads,
            choose=self._choose,
            done=self._end,
            moved=self._moved,
            bytes_per_s=bytes_per_s,
        )

    def source(self, index: int, *, after: MemoryLink | None = None) -> MemoryLink | None:
        """The best link that has an expert. Args: after: of those less preferred than this one."""
        rest = self.links if after is None else self.links[self.links.index(after) + 1 :]
        return next((link for link in rest if link.has(index)), None)

    def prefetch(self, index: int) -> bool:
        """Queue the load of an absent expert that nobody waits for; False: no slot, or nothing to take it from."""
        if self.source(index) is None or not self.residents.prepare(index):
            return False
        transfer = self._transfer(index, is_demand=False)
        if transfer is not None:
            self.queue.add(transfer)
        return transfer is not None

    def demand(self, index: int) -> bool:
        """Somebody waits for an expert: put its load first; it begins once there is a slot.

        Returns whether a prefetch was given up for it: what that held is free for others, too.
        """
        under_way = self.queue.transfers.get(index)
        if under_way is not None:  # one that was given up is asked for again when it has ended
            under_way.is_demand = under_way.is_demand or not under_way.stops
            return False
        residents = self.residents
        if self.source(index) is None or residents.states[index] != ABSENT:
            return False
        is_prepared = residents.prepare(index)
        freed = not is_prepared and self._give_up_prefetch()
        if is_prepared or (freed and residents.prepare(index)):
            transfer = self._transfer(index, is_demand=True)
            if transfer is not None:
                self.queue.add(transfer)
        return freed

    def give_up(self, index: int) -> None:
        """Nobody waits for an expert any more."""
        transfer = self.queue.transfers.get(index)
        if transfer is not None and transfer.is_demand:
            transfer.is_demand = False
            self._cancel(transfer)

    def want(self, priority: np.ndarray | None, *, keeps_begun: bool) -> bool:
        """Replace what is to be prefetched; whether something under way was given up, and its slot is free.

        Args: keeps_begun: what is under way may end though nobody wants it now.
        """
        self.priority = priority
        self.failed = self.backoff.waiting()
        freed = False
        if not keeps_begun:
            for transfer in list(self.queue.transfers.values()):
                if not transfer.is_demand and (priority is None or priority[transfer.index] <= 0):
                    freed |= self._cancel(transfer)
        if (self.fills_up and self.residents.num_free) or self._open().any():  # else its threads need not look
            self.queue.wake()
        return freed

    def _give_up_prefetch(self) -> bool:
        """Cancel the prefetch begun last, for its slot; False: it comes when a chunk or a computation ends."""
        prefetches = [transfer for transfer in self.queue.transfers.values() if not transfer.is_demand]
        if not prefetches or any(transfer.stops for transfer in prefetches):  # none, or one is on its way
            return False
        return self._cancel(prefetches[-1])

    def _choose(self) -> ExpertTransfer | None:
        """The most wanted expert that can come now, with the slot of one that is wanted less."""
        residents = self.residents
        if residents.num_awaited:  # a slot is wanted more than a forecast
            return None
        is_open = self._open()
        if self.priority is not None and is_open.any():
            index = int(np.where(is_open, self.priority, 0).argmax())
            if residents.prepare(index, self.priority >= self.priority[index]):
                return self._transfer(index, is_demand=False)
        if self.fills_up and residents.num_free:
            absent = self._absent()
            if absent.any():
                index = int(np.where(absent, residents.order.scores(), -np.inf).argmax())
                residents.prepare(index)
                return self._transfer(index, is_demand=False)
        return None

    def _open(self) -> np.ndarray:
        """[N] bool: which of the wanted are absent and can come now."""
        if self.priority is None or self.residents.num_resident == len(self.priority):
            return np.zeros(1, dtype=np.bool_)
        is_open = self._absent()
        is_open &= self.priority > 0
        return is_open if self.below is None else is_open & self.below.residents.resident

    def _absent(self) -> np.ndarray:
        absent = self.residents.absent
        if self.failed:
            absent[list(self.failed)] = False
        held = self.backoff.held()
        if held is not None:
            absent &= ~held
        return absent

    def _transfer(self, index: int, *, is_demand: bool, after: MemoryLink | None = None) -> ExpertTransfer | None:
        """Of an expert that has a slot. None: no link has it now, and it is absent again."""
        link = self.source(index, after=after)
        if link is None:
            self.residents.abandon(index)
            return None
        if self.below is not None:
            self.below.residents.hold((index,))
        return ExpertTransfer(index, self.residents.slots[index], link, link.num_chunks(index), is_demand)

    def _cancel(self, transfer: ExpertTransfer) -> bool:
        """Give one up; whether it is over, and its slot is free."""
        is_over = self.queue.cancel(transfer)
        if is_over:
            self._close(transfer)
        return is_over

    def _moved(self, transfer: ExpertTransfer, num_bytes: int) -> None:
        self._counters.bytes_moved[transfer.link.tier] += num_bytes
        if not transfer.is_demand:
            self._counters.prefetch_bytes[transfer.link.tier] += num_bytes

    def _end(self, transfer: ExpertTransfer) -> None:
        """A transfer is over, on the thread that moved its last chunk."""
        if self._close(transfer):
            self._done(self, transfer)

    def _close(self, transfer: ExpertTransfer) -> bool:
        """Say what became of a transfer's expert; False: it comes by another link."""
        index = transfer.index
        if self.below is not None:
            self.below.residents.release((index,))
        if not transfer.stops:
            self.residents.complete(index, prefetched=not transfer.is_demand)
            self.backoff.succeeded(index)
            return True
        if transfer.error is not None and not transfer.is_cancelled:  # a node may be gone; the disk is not
            again = self._transfer(index, is_demand=transfer.is_demand, after=transfer.link)
            if again is not None:
                self.queue.add(again)
                return False
        else:
            self.residents.abandon(index)
        if transfer.is_cancelled:
            self.num_dropped[index // self._num_experts] += 1
        if transfer.error is not None and not transfer.is_demand:
            self.failed[index] = transfer.error
            self.backoff.failed(index, transfer.error)
        return True
