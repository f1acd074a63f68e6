"""How many generation requests are being answered, and whether new ones may come. Only bookkeeping."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Generator
from contextlib import contextmanager


class OpenRequests:
    """Counts requests from the first header to the last byte; draining is a promise to let none in."""

    def __init__(self, on_change: Callable[[int], None]) -> None:
        self._on_change = on_change
        self._num_open = 0
        self._draining = False
        self._idle = asyncio.Event()
        self._idle.set()

    @property
    def num_in_flight(self) -> int:
        """Generation requests being answered now."""
        return self._num_open

    @property
    def draining(self) -> bool:
        """Whether new generation requests are refused."""
        return self._draining

    def begin_drain(self) -> None:
        """From now on refuse new generation requests; there is no way back."""
        self._draining = True

    async def wait_idle(self, timeout_s: float) -> bool:
        """Wait until nothing is in flight; False if something still is after `timeout_s`."""
        try:
            async with asyncio.timeout(timeout_s):
                await self._idle.wait()
        except TimeoutError:
            return False
        return True

    @contextmanager
    def counted(self) -> Generator[None]:
        """Count one request while it is answered."""
        self._change(1)
        try:
            yield
        finally:
            self._change(-1)

    def _change(self, by: int) -> None:
        self._num_open += by
        if self._num_open:
            self._idle.clear()
        else:
            self._idle.set()
        self._on_change(self._num_open)
