"""Who may be given to another worker now: when one dies, all its sequences come back to the front end at once.

A few of them ask at a time, the oldest requests first; the others wait until one of these is taken or given up. Knows
an order and coroutines; knows nothing of workers.
"""

from __future__ import annotations

import asyncio
import heapq
import itertools
from dataclasses import dataclass, field

from cluster.errors import Unavailable

AT_ONCE = 16  # sequences of one front end that look for another worker at the same time
LONGEST_WAIT_S = 120.0  # for a turn; the request's own deadline is usually sooner


@dataclass(order=True, slots=True)
class _Waiting:
    order: float
    number: int
    is_called: asyncio.Future[None] = field(compare=False)


class FailoverGate:
    """Turns of one front end; for one event loop."""

    def __init__(self, *, at_once: int = AT_ONCE, longest_wait_s: float = LONGEST_WAIT_S) -> None:
        self._num_free = at_once
        self._longest_wait_s = longest_wait_s
        self._waiting: list[_Waiting] = []
        self._numbers = itertools.count()

    @property
    def num_waiting(self) -> int:
        """Sequences that wait for a turn."""
        return sum(not waiting.is_called.done() for waiting in self._waiting)

    async def enter(self, order: float) -> None:
        """Wait for a turn; whoever got one must `leave`. Args: order: the smaller, the sooner.

        Raises:
            Unavailable: no turn came in time.
        """
        if self._num_free and not self.num_waiting:
            self._num_free -= 1
            return
        waiting = _Waiting(order, next(self._numbers), asyncio.get_running_loop().create_future())
        heapq.heappush(self._waiting, waiting)
        try:
            async with asyncio.timeout(self._longest_wait_s):
                await waiting.is_called
        except TimeoutError as error:
            if waiting.is_called.done() and not waiting.is_called.cancelled():
                return  # its turn had come in the same moment
            raise Unavailable(
                f"workers were lost, and {self.num_waiting} requests wait to be given to another one; try again later"
            ) from error
        except asyncio.CancelledError:
            if waiting.is_called.done() and not waiting.is_called.cancelled():
                self.leave()  # its turn had come in the same moment
            raise

    def leave(self) -> None:
        """The turn is over: the next one's comes."""
        while self._waiting:
            waiting = heapq.heappop(self._waiting)
            if not waiting.is_called.done():
                waiting.is_called.set_result(None)
                return
        self._num_free += 1


class Turn:
    """One sequence's: held from when it looks for another worker until one has taken it."""

    def __init__(self, gate: FailoverGate, order: float) -> None:
        """Args: order: as in `FailoverGate.enter`; when the request came."""
        self._gate, self._order = gate, order
        self._is_held = False

    async def take(self) -> None:
        """Wait for it, unless it is held already. Raises Unavailable as `FailoverGate.enter`."""
        if not self._is_held:
            await self._gate.enter(self._order)
            self._is_held = True

    def give_back(self) -> None:
        """A worker has taken the sequence, or it has ended; idempotent."""
        if self._is_held:
            self._is_held = False
            self._gate.leave()
