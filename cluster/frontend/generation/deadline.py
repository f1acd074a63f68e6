"""The time that one sequence may take: it runs out, or somebody ends it. Knows the event loop's clock, no worker."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator

from cluster.errors import DeadlineExceeded
from cluster.types import TokenChunk


class SequenceDeadline:
    """The end of one sequence's time, which `abort` brings forward to now."""

    def __init__(self, at_s: float) -> None:
        """`at_s` is on the loop's clock."""
        self.is_aborted = False
        self._at_s = at_s
        self._wait: asyncio.Timeout | None = None

    def abort(self) -> None:
        """End the wait for the next chunk, if there is one, and all later ones."""
        self.is_aborted = True
        if self._wait is not None:
            with contextlib.suppress(RuntimeError):  # it ended in this turn of the loop
                self._wait.reschedule(asyncio.get_running_loop().time())

    async def next_chunk(self, tokens: AsyncIterator[TokenChunk]) -> TokenChunk | None:
        """The next chunk, or None when there are no more or the sequence was aborted.

        Raises:
            DeadlineExceeded: it did not come in time.
        """
        if self.is_aborted:
            return None
        try:
            async with asyncio.timeout_at(self._at_s) as self._wait:
                return await anext(tokens, None)
        except TimeoutError as error:
            if self.is_aborted:
                return None
            message = "the request's time ran out; it was stopped (frontend.request_timeout_s)"
            raise DeadlineExceeded(message) from error
        finally:
            self._wait = None
