"""Tells the scheduler at a steady pace, and when asked to, what a process is doing.

A scheduler that is away costs age and nothing else.

Knows when to tell and since when nobody listened; knows nothing of what is told. A thread of its own: whoever computes
never waits for it.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable

from cluster.errors import MoesaicError
from cluster.logs import log_event

_LOG = logging.getLogger(__name__)
_PATIENCE = 5.0  # intervals without an answer until it is called degraded: a restart takes about as long


class ReportLoop:
    """Calls `tell` every `interval_s` seconds."""

    def __init__(
        self, tell: Callable[[], None], *, interval_s: float, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: tell: one exchange with the scheduler, bounded; raises MoesaicError where there was none."""
        self._tell = tell
        self._interval_s = interval_s
        self._clock = clock
        self._answered_s = clock()
        self._reason: str | None = None
        self._is_stopped = False
        self._wake = threading.Event()
        self._thread = threading.Thread(target=self._run, name="reports", daemon=True)

    @property
    def degraded(self) -> tuple[str, ...]:
        """Since when the scheduler has been away, in words; empty while it listens."""
        reason, silent_s = self._reason, self._clock() - self._answered_s
        if reason is None or silent_s < _PATIENCE * self._interval_s:
            return ()
        return (f"scheduler away for {silent_s:.0f} s ({reason}); routing and placement stand still",)

    def start(self) -> None:
        """Tell from now on."""
        self._thread.start()

    def soon(self) -> None:
        """Tell now, not when the interval is over: something changed that others wait for. From any thread."""
        self._wake.set()

    def stop(self) -> None:
        """Tell no more; waits for an exchange under way."""
        self._is_stopped = True
        self._wake.set()
        if self._thread.is_alive():
            self._thread.join(timeout=5)

    def exchange(self) -> None:
        """One exchange; whatever becomes of it, the loop goes on."""
        try:
            self._tell()
        except MoesaicError as error:
            if self._reason is None:
                log_event(_LOG, logging.WARNING, "the scheduler is away", reason=error.message)
            self._reason = error.message
            return
        except Exception as error:  # noqa: BLE001 - top loop: the process serves without a scheduler
            log_event(_LOG, logging.ERROR, "a report failed", error=error)
            self._reason = f"a report failed: {error!r}"
            return
        self._answered_s, self._reason = self._clock(), None

    def _run(self) -> None:
        while not self._is_stopped:
            self.exchange()
            self._wake.wait(self._interval_s)
            self._wake.clear()
