"""One background loop for all there are: a turn at a steady pace, sooner when asked for, until it is stopped.

`Pace` decides when the next turn is due and what is said of one that failed; `PeriodicLoop` runs turns in a thread of
its own, `PeriodicTask` in an event loop. Knows nothing of what a turn does.

A failure that was to be expected (a store that is away) keeps the pace and is said once, until a turn succeeds again.
Any other is a defect: it is logged with its traceback the 1st, 2nd, 4th, 8th time in a row, and the pause doubles.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Awaitable, Callable
from typing import TypeAlias

from cluster.errors import MoesaicError
from cluster.logs import log_event

_LOG = logging.getLogger(__name__)
_RETRY_S = 1.0  # of a loop without a pace of its own
_MAX_BACKOFF = 8  # times the pause: a defect must not fill the log, and what it needs may come back

Pause: TypeAlias = float | None  # seconds until the next turn; None: the loop's interval


class Pace:
    """How a loop goes on after each of its turns. No thread, no clock.

    `num_turns` since start; `num_failed` of the last ones in a row, and why the last one did (`problem`).

    >>> pace = Pace("poll", interval_s=2.0, expected=(ConnectionError,))
    >>> pace.succeeded(), pace.succeeded(0.5)
    (2.0, 0.5)
    >>> pace.failed(ConnectionError("away")), pace.problem
    (2.0, 'away')
    >>> pace.succeeded(), pace.problem
    (2.0, None)
    """

    def __init__(
        self,
        name: str,
        *,
        interval_s: float | None,
        expected: tuple[type[Exception], ...] = (),
        event: str | None = None,
    ) -> None:
        """Args: interval_s: None: the next turn is when it is asked for. event: what the log says when turns begin to
        fail as expected."""
        self.num_turns = 0
        self.num_failed = 0
        self.problem: str | None = None
        self.name = name
        self._interval_s = interval_s
        self._expected = expected
        self._event = event or f"a turn of {name} failed"

    def succeeded(self, pause_s: Pause = None) -> float | None:
        """Seconds until the next turn; None: until it is asked for. Args: pause_s: as the turn wants it."""
        self.num_turns += 1
        self.num_failed, self.problem = 0, None
        return self._interval_s if pause_s is None else pause_s

    def failed(self, error: Exception) -> float | None:
        """Seconds until the next turn, after one that failed; logs it unless that was said."""
        self.num_turns += 1
        self.num_failed += 1
        if isinstance(error, self._expected):
            reason = error.message if isinstance(error, MoesaicError) else str(error) or repr(error)
            if self.problem is None:
                log_event(_LOG, logging.WARNING, self._event, reason=reason)
            self.problem = reason
            return self._interval_s
        self.problem = f"a turn of {self.name} failed: {error!r}"
        number = self.num_failed
        if number & (number - 1) == 0:
            log_event(_LOG, logging.ERROR, f"a turn of {self.name} failed", error=error, in_a_row=number)
        return (self._interval_s or _RETRY_S) * min(_MAX_BACKOFF, 2 ** min(number - 1, 10))


class PeriodicLoop:
    """Runs turns in a daemon thread. `start` once; `soon` and `stop` from any thread, also from within a turn."""

    def __init__(
        self,
        turn: Callable[[], Pause],
        pace: Pace,
        *,
        first_s: float | None = 0.0,
        max_cpu_share: float | None = None,
        ends_with_turn: bool = False,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """Args:
        turn: bounded by a deadline of its own; may return when the next one is due.
        first_s: seconds until the first turn; None: until it is asked for.
        max_cpu_share: of one core; turns that cost more come less often.
        ends_with_turn: whether `stop` has one more made, for what is left.
        """
        self.cpu_s = 0.0  # processor time of all turns
        self.pause_s: float | None = first_s  # until the next turn
        self.pace = pace
        self._turn = turn
        self._max_cpu_share = max_cpu_share
        self._ends_with_turn = ends_with_turn
        self._clock = clock
        self._succeeded_s = clock()
        self._stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name=pace.name, daemon=True)

    @property
    def silent_s(self) -> float:
        """Seconds since the last turn that succeeded, or since it was made."""
        return self._clock() - self._succeeded_s

    @property
    def is_stopped(self) -> bool:
        """Whether no turn begins any more."""
        return self._stopped

    def start(self) -> None:
        """Make turns from now on."""
        self._thread.start()

    def soon(self) -> None:
        """Make a turn now, not when the pause is over; one that is under way is followed by another."""
        self._wake.set()

    def stop(self, timeout_s: float) -> bool:
        """Make no more turns, and wait for one under way, but not longer than `timeout_s`; whether it has ended."""
        self._stopped = True
        self._wake.set()
        if self._thread is threading.current_thread() or not self._thread.is_alive():
            return not self._thread.is_alive()
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def turn(self) -> float | None:
        """One turn, whatever becomes of it; seconds until the next (None: until it is asked for)."""
        began_s = time.thread_time()
        try:
            pause_s = self.pace.succeeded(self._turn())
            self._succeeded_s = self._clock()
        except Exception as error:  # noqa: BLE001 - top loop: logged by the pace, and it goes on
            pause_s = self.pace.failed(error)
        cost_s = time.thread_time() - began_s
        self.cpu_s += cost_s
        if pause_s is not None and self._max_cpu_share is not None:
            pause_s = max(pause_s, cost_s / self._max_cpu_share)
        self.pause_s = pause_s
        return pause_s

    def _run(self) -> None:
        self._wake.wait(self.pause_s)
        while not self._stopped:
            self._wake.clear()
            self._wake.wait(self.turn())
        if self._ends_with_turn:
            self.turn()


class PeriodicTask:
    """Runs turns in an event loop; everything belongs to that loop. May be started again once it was stopped."""

    def __init__(self, turn: Callable[[], Awaitable[Pause]], pace: Pace) -> None:
        self._turn = turn
        self._pace = pace
        self._task: asyncio.Task[None] | None = None

    def start(self) -> None:
        """Make turns from now on; a second call does nothing."""
        if self._task is None or self._task.done():
            self._task = asyncio.get_running_loop().create_task(self._run())

    def stop(self) -> None:
        """Make no more turns; one under way is given up at its next wait."""
        if self._task is not None:
            self._task.cancel()
            self._task = None

    async def close(self) -> None:
        """Stop, and wait until a turn under way has ended."""
        task = self._task
        self.stop()
        if task is not None:
            await asyncio.wait((task,))

    async def _run(self) -> None:
        while True:
            try:
                pause_s = self._pace.succeeded(await self._turn())
            except Exception as error:  # noqa: BLE001 - top loop: logged by the pace, and it goes on
                pause_s = self._pace.failed(error)
            await asyncio.sleep(_RETRY_S if pause_s is None else pause_s)  # nobody can ask a task for a turn
