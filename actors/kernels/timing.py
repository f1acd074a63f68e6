"""Times alternatives against each other at start. Knows a clock, nothing of what it times."""

from __future__ import annotations

import time
from collections.abc import Callable

_RUNS = 4


def best_time(run: Callable[[], object]) -> float:
    """Seconds of the shortest of a few runs after a warm-up, which also lets oneDNN compile its kernel."""
    run()
    best = float("inf")
    for _ in range(_RUNS):
        began = time.perf_counter()
        run()
        best = min(best, time.perf_counter() - began)
    return best
