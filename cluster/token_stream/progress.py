"""Whether an engine gets on with its work: health is progress, not an open connection.

Knows counters that grow while work is done, and time; knows nothing of what is counted.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

SHORTEST_S = 2.0  # DESIGN 10: no progress for max(2 s, 20 steps)
NUM_STEPS = 20


@dataclass(frozen=True, slots=True)
class Progress:
    """What a worker says of itself with every frame. Seconds.

    stalled_s: since anything grew, while there is work. allowed_s: how long that may last before it counts as lost.
    silence_s: how long it may say nothing at all.
    """

    stalled_s: float = 0.0
    allowed_s: float = SHORTEST_S
    silence_s: float = SHORTEST_S


class ProgressMeter:
    """Follows one engine from outside its thread."""

    def __init__(
        self, *, first_step_s: float, wait_s: float = 0.0, clock: Callable[[], float] = time.monotonic
    ) -> None:
        """Args: first_step_s: allowed as long as no step has ended. wait_s: a legal wait inside a step for something
        that has a deadline of its own, such as an answer of an expert host; it comes on top."""
        self._first_step_s = first_step_s
        self._wait_s = wait_s
        self._clock = clock
        self._marks: tuple[int, ...] = ()
        self._since_s = clock()

    def look(self, marks: tuple[int, ...], *, step_s: float, has_work: bool) -> Progress:
        """Args: marks: counters, of which at least one grows at every layer and with every piece of a load. step_s: a
        recent step's duration; 0 before the first."""
        now_s = self._clock()
        if not has_work or marks != self._marks:
            self._marks, self._since_s = marks, now_s
        steps_s = max(SHORTEST_S, NUM_STEPS * step_s)
        allowed_s = (steps_s if step_s else max(SHORTEST_S, self._first_step_s)) + self._wait_s
        return Progress(stalled_s=now_s - self._since_s, allowed_s=allowed_s, silence_s=steps_s)
