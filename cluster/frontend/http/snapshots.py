"""Answers that many ask for at once: one question goes out, and its answer serves all for a short while.

Knows questions by name; knows nothing of what they mean.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass
from typing import Any, TypeVar, cast

Answer = TypeVar("Answer")


@dataclass(slots=True, eq=False)
class _Asked:
    task: asyncio.Task[Any]
    asked_s: float


class Snapshots:
    """Of one event loop. An answer is at most `max_age_s` old when it is given, counted from its question."""

    def __init__(self, max_age_s: float, *, timeout_s: float, now_s: Callable[[], float] = time.monotonic) -> None:
        """Args: timeout_s: of a question, whoever still waits for it."""
        self._max_age_s, self._timeout_s, self._now_s = max_age_s, timeout_s, now_s
        self._asked: dict[str, _Asked] = {}

    async def get(self, name: str, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        """The answer to the question `name`. Whoever leaves takes nothing from the others.

        Raises:
            TimeoutError: none came in time. Else what `ask` raises; it is not asked again for as long.
        """
        asked = self._asked.get(name)
        if asked is None or (asked.task.done() and self._now_s() - asked.asked_s >= self._max_age_s):
            asked = self._asked[name] = _Asked(asyncio.create_task(self._bounded(ask)), self._now_s())
            asked.task.add_done_callback(_note_error)
        return cast(Answer, await asyncio.shield(asked.task))

    def forget(self) -> None:
        """Something was changed: what was said before is not so any more."""
        self._asked.clear()

    async def _bounded(self, ask: Callable[[], Awaitable[Answer]]) -> Answer:
        async with asyncio.timeout(self._timeout_s):
            return await ask()


def _note_error(task: asyncio.Task[Any]) -> None:
    """All who waited may have left: nobody is to be told that nobody looked."""
    if not task.cancelled():
        task.exception()
