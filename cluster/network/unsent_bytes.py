"""How much a peer may leave unread before its connection is worth nothing: a bound in bytes and one in time.

Knows counters and a clock that is told; knows no sockets.
"""

from __future__ import annotations

MAX_UNSENT_BYTES = 16 * 2**20  # minutes of tokens for hundreds of sequences
MAX_STILL_S = 10.0  # longer than a busy process may stand still


class UnsentBytes:
    """What one connection has taken in and not got rid of."""

    def __init__(self, *, max_bytes: int = MAX_UNSENT_BYTES, max_still_s: float = MAX_STILL_S) -> None:
        self._max_bytes, self._max_still_s = max_bytes, max_still_s
        self._num_written = self._num_sent = 0
        self._moved_s: float | None = None  # when the peer last took anything; None: it has taken everything

    def note_written(self, num_bytes: int) -> None:
        """So much was given to the connection."""
        self._num_written += num_bytes

    def problem(self, num_unsent: int, now_s: float) -> str | None:
        """Why the peer counts as stalled; None while it reads. Args: num_unsent: bytes that wait for it now."""
        num_sent = self._num_written - num_unsent
        if not num_unsent:
            self._moved_s = None
        elif num_sent > self._num_sent or self._moved_s is None:
            self._moved_s = now_s
        self._num_sent = num_sent
        if num_unsent > self._max_bytes:
            return f"{num_unsent} bytes wait for it; {self._max_bytes} are allowed"
        if self._moved_s is not None and now_s - self._moved_s > self._max_still_s:
            return f"it has read nothing for {now_s - self._moved_s:.1f} s, and {num_unsent} bytes wait for it"
        return None
