"""Tells the scheduler at a steady pace, and when asked to, what a process is doing.

A scheduler that is away costs age and nothing else.

Knows when to tell and since when nobody listened; knows nothing of what is told. A thread of its own: whoever computes
never waits for it.
"""

from __future__ import annotations

import time
from collections.abc import Callable

from cluster.errors import MoesaicError
from cluster.periodic import Pace, PeriodicLoop

_PATIENCE = 5.0  # intervals without an answer until it is called degraded: a restart takes about as long
_STOP_TIMEOUT_S = 5.0


class ReportLoop:
    """Calls `tell` every `interval_s` seconds."""

    def __init__(
        self, tell: Callable[[], None], *, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: tell: one exchange with the scheduler, bounded; raises MoesaicError where there was none."""
        self._interval_s = interval_s
        pace = Pace("reports", interval_s=interval_s, expected=(MoesaicError,), event="the scheduler is away")
        self._loop = PeriodicLoop(tell, pace, clock=clock)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Since when the scheduler has been away, in words; empty while it listens."""
        reason, silent_s = self._loop.pace.problem, self._loop.silent_s
        if reason is None or silent_s < _PATIENCE * self._interval_s:
            return ()
        return (f"scheduler away for {silent_s:.0f} s ({reason}); routing and placement stand still",)

    def start(self) -> None:
        """Tell from now on."""
        self._loop.start()

    def soon(self) -> None:
        """Tell now, not when the interval is over: something changed that others wait for. From any thread."""
        self._loop.soon()

    def stop(self) -> None:
        """Tell no more; waits for an exchange under way."""
        self._loop.stop(_STOP_TIMEOUT_S)

    def exchange(self) -> None:
        """One exchange; whatever becomes of it, the loop goes on."""
        self._loop.turn()
