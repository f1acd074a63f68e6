"""Where the work is done that clients' input makes before a worker is asked: beside the event loop, and bounded.

Knows threads; knows no input. What is small is done at once: a thread would cost more than it.
"""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TypeVar

from cluster.errors import Overloaded

SMALL_BYTES = 4096

Result = TypeVar("Result")


class InputPool:
    """A few threads and a queue with an end."""

    def __init__(self, *, threads: int, max_waiting: int, on_refusal: Callable[[], None] = lambda: None) -> None:
        """Threads start when they are needed. `on_refusal` is called whenever the queue is full."""
        self._executor = ThreadPoolExecutor(threads, thread_name_prefix="input")
        self._max_open = threads + max_waiting
        self._on_refusal = on_refusal
        self._num_open = 0
        self._counting = threading.Lock()

    async def run(self, work: Callable[[], Result], *, num_bytes: int | None = None) -> Result:
        """The result of `work`; at once where its input is small, else from a thread.

        Args: num_bytes: size of its input; None where the size tells nothing about the work.
        Raises:
            Overloaded: as much is waiting as may.
        """
        if num_bytes is not None and num_bytes <= SMALL_BYTES:
            return work()
        with self._counting:
            is_full = self._num_open >= self._max_open
            self._num_open += not is_full
        if is_full:
            self._on_refusal()
            message = f"{self._max_open} inputs are being read already (frontend.max_input_queue); try again later"
            raise Overloaded(message)
        future = self._executor.submit(work)
        future.add_done_callback(self._count_end)  # also when nobody waits any more: a thread is busy until then
        return await asyncio.wrap_future(future)

    def _count_end(self, _: Future[Result]) -> None:
        with self._counting:
            self._num_open -= 1
