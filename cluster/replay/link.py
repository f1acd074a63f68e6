"""One link of constant rate in virtual time: whole chunks, one after the other.

Knows times and bytes; knows no experts. A chunk under way is never interrupted, so a demand waits for one at most.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

CHUNKS_PER_EXPERT = 3


@dataclass(frozen=True, slots=True)
class LinkTransfer:
    """Chunks sent without a gap: [start_s, end_s], `num_chunks` of them, asked for at `asked_s`."""

    asked_s: float
    start_s: float
    end_s: float
    num_chunks: int
    is_demand: bool


class ReplayLink:
    """busy_until_s: end of the last chunk that was begun. busy_s: of all chunks that were begun.

    >>> link = ReplayLink(bytes_per_s=8, chunk_bytes=4)
    >>> link.send(3, asked_s=1.0, is_demand=False), link.send(1, asked_s=2.0, is_demand=True)
    (2.5, 3.0)
    """

    def __init__(
        self, *, bytes_per_s: float, chunk_bytes: float, on_transfer: Callable[[LinkTransfer], None] | None = None
    ) -> None:
        """Args: on_transfer: told of everything sent."""
        self.chunk_s = chunk_bytes / bytes_per_s
        self.busy_until_s = self.busy_s = 0.0
        self._on_transfer = on_transfer

    def send(self, num_chunks: int, *, asked_s: float, is_demand: bool) -> float:
        """Send chunks as soon as the link is free, not before `asked_s`; when the last one has arrived."""
        start_s = max(self.busy_until_s, asked_s)
        self.busy_until_s = start_s + num_chunks * self.chunk_s
        self.busy_s += num_chunks * self.chunk_s
        if self._on_transfer is not None:
            self._on_transfer(LinkTransfer(asked_s, start_s, self.busy_until_s, num_chunks, is_demand))
        return self.busy_until_s

    def busy_s_until(self, now_s: float) -> float:
        """Of `busy_s`, what is over by then: by the end of a chunk, or while chunks follow each other."""
        return self.busy_s - max(self.busy_until_s - now_s, 0.0)
