"""One arena of an expert memory with everything about it: who is in it, the links into it, their queue, its wishes.

Knows experts as indices, slots and transfers; knows nothing of layers or steps. The store's lock guards it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np

from actors.experts.memory.backoff import ReadBackoff
from actors.experts.memory.counters import MemoryCounters
from actors.experts.memory.links import MemoryLink
from actors.experts.memory.residents import Residents
from actors.experts.memory.transfers import ExpertTransfer, TransferQueue
from cluster.errors import ExpertReadError


class Stage:
    """An arena and the way into it.

    links: in the order of preference. below: the stage that its link reads from, if that is an arena. priority: [N],
    what is wanted ahead. may_prefetch: whether loads ahead may begin now. fills_up: free slots take what is worth most,
    wanted or not. backoff: loads ahead that ended in an error, and when they may be tried again. failed: those that
    were not tried again since something was last wanted.
    """

    def __init__(
        self,
        name: str,
        residents: Residents,
        links: Sequence[MemoryLink],
        *,
        lock: threading.Lock,
        num_threads: int,
        counters: MemoryCounters,
        done: Callable[[Stage, ExpertTransfer], None],
        backoff: ReadBackoff,
        below: Stage | None = None,
        fills_up: bool = False,
        bytes_per_s: float = 0.0,
    ) -> None:
        """Args: bytes_per_s: of an emulated link. done: told, under the lock, when a transfer has ended for good and
        its expert is resident or not."""
        self.residents = residents
        self.links = tuple(links)
        self.below = below
        self.fills_up = fills_up
        self.priority: np.ndarray | None = None
        self.backoff = backoff
        self.failed: dict[int, ExpertReadError] = {}
        self.may_prefetch: Callable[[], bool] = lambda: True
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

    def begin(self, index: int, take: Callable[[], int | None], *, is_demand: bool) -> bool:
        """Queue the load of an expert into the slot that `take` finds; False: there is none, or nothing that this stage
        can take the expert from, and then no slot is taken."""
        if self.source(index) is None:
            return False
        slot = take()
        if slot is None:
            return False
        transfer = None
        if index not in self.queue.transfers:  # to give a slot up may have begun what is waited for
            transfer = self._transfer(index, slot, is_demand=is_demand)
        if transfer is None:
            self.residents.give_back(slot)
            return False
        self.queue.add(transfer)
        return True

    def demand(self, index: int) -> None:
        """Somebody waits for an expert: put its load first; it begins once there is a slot."""
        under_way = self.queue.transfers.get(index)
        if under_way is not None:  # one that was given up is asked for again when it has ended
            under_way.is_demand = under_way.is_demand or not under_way.stops
            return
        self.begin(index, self._slot_for_demand, is_demand=True)

    def give_up(self, index: int) -> None:
        """Nobody waits for an expert any more."""
        transfer = self.queue.transfers.get(index)
        if transfer is not None and transfer.is_demand:
            transfer.is_demand = False
            self.queue.cancel(transfer)

    def want(self, priority: np.ndarray | None, *, keeps_begun: bool) -> None:
        """Replace what is wanted ahead. Args: keeps_begun: what is under way may end though nobody wants it now."""
        self.priority = priority
        self.failed = self.backoff.waiting()
        if not keeps_begun:
            for transfer in list(self.queue.transfers.values()):
                if not transfer.is_demand and (priority is None or priority[transfer.index] <= 0):
                    self.queue.cancel(transfer)
        if (self.fills_up and self.residents.num_free) or self._open().any():  # else its threads need not look
            self.queue.wake()

    def _slot_for_demand(self) -> int | None:
        """A slot, if need be that of a load ahead; None: one comes when a chunk or a computation ends."""
        slot = self.residents.take()
        if slot is not None:
            return slot
        ahead = [transfer for transfer in self.queue.transfers.values() if not transfer.is_demand]
        if not ahead or any(transfer.stops for transfer in ahead):
            return None  # one is on its way
        self.queue.cancel(ahead[-1])
        return self.residents.take_free()

    def _choose(self) -> ExpertTransfer | None:
        """The most wanted expert that can come now, with the slot of one that is wanted less."""
        residents = self.residents
        if not self.may_prefetch():
            return None
        is_open = self._open()
        if self.priority is not None and is_open.any():
            index = int(np.where(is_open, self.priority, 0).argmax())
            slot = residents.take(self.priority >= self.priority[index])
            if slot is not None:
                return self._ahead(index, slot)
        if self.fills_up and residents.num_free:
            absent = self._absent()
            if absent.any():
                slot = residents.take_free()
                assert slot is not None
                index = int(np.where(absent, residents.order.scores(), -np.inf).argmax())
                return self._ahead(index, slot)
        return None

    def _ahead(self, index: int, slot: int) -> ExpertTransfer | None:
        transfer = self._transfer(index, slot, is_demand=False)
        if transfer is None:
            self.residents.give_back(slot)
        return transfer

    def _open(self) -> np.ndarray:
        """[N] bool: which of the wanted are absent and can come now."""
        if self.priority is None or 0 not in self.residents.is_resident:
            return np.zeros(1, dtype=np.bool_)
        is_open = self._absent()
        is_open &= self.priority > 0
        return is_open if self.below is None else is_open & self.below.residents.resident

    def _absent(self) -> np.ndarray:
        absent = ~(self.residents.resident | self.residents.loading)
        if self.failed:
            absent[list(self.failed)] = False
        held = self.backoff.held()
        if held is not None:
            absent &= ~held
        return absent

    def _transfer(
        self, index: int, slot: int, *, is_demand: bool, after: MemoryLink | None = None
    ) -> ExpertTransfer | None:
        """None, and nothing is changed: no link has the expert now."""
        link = self.source(index, after=after)
        if link is None:
            return None
        transfer = ExpertTransfer(index, slot, link, link.num_chunks(index), is_demand)
        self.residents.loading[index] = True
        if self.below is not None:
            self.below.residents.hold((index,))
        return transfer

    def _moved(self, transfer: ExpertTransfer, num_bytes: int) -> None:
        self._counters.bytes_moved[transfer.link.tier] += num_bytes
        if not transfer.is_demand:
            self._counters.prefetch_bytes[transfer.link.tier] += num_bytes

    def _end(self, transfer: ExpertTransfer) -> None:
        index = transfer.index
        self.residents.loading[index] = False
        if self.below is not None:
            self.below.residents.release((index,))
        if not transfer.stops:
            self.residents.insert(index, transfer.slot)
            self.backoff.succeeded(index)
            self._done(self, transfer)
            return
        again = None
        if not transfer.is_cancelled:  # a node may be gone; the disk is not
            again = self._transfer(index, transfer.slot, is_demand=transfer.is_demand, after=transfer.link)
        if again is not None:
            self.queue.add(again)
            return
        self.residents.give_back(transfer.slot)
        if transfer.error is not None and not transfer.is_demand:
            self.failed[index] = transfer.error
            self.backoff.failed(index, transfer.error)
        self._done(self, transfer)
