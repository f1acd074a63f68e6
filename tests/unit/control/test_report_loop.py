"""A scheduler that is away is said so after a while, and nothing ends the loop."""

from __future__ import annotations

import threading

from cluster.control.report_loop import ReportLoop
from cluster.errors import Unavailable

DEADLINE_S = 10.0


def test_away_is_told_after_some_patience_and_taken_back() -> None:
    now_s, failures = [0.0], [Unavailable("there is no scheduler")]

    def tell() -> None:
        if failures:
            raise failures[0]

    loop = ReportLoop(tell, interval_s=1.0, clock=lambda: now_s[0])
    loop.exchange()
    now_s[0] = 4.0
    assert loop.degraded == ()
    now_s[0] = 7.0

    assert loop.degraded == ("scheduler away for 7 s (there is no scheduler); routing and placement stand still",)
    failures.clear()
    loop.exchange()
    assert loop.degraded == ()


def test_it_goes_on_whatever_a_report_raises() -> None:
    told = threading.Semaphore(0)

    def tell() -> None:
        told.release()
        raise RuntimeError("a defect")

    loop = ReportLoop(tell, interval_s=0.001)
    loop.start()
    try:
        assert all(told.acquire(timeout=DEADLINE_S) for _ in range(3))
    finally:
        loop.stop()


def test_what_others_wait_for_is_told_at_once() -> None:
    told = threading.Semaphore(0)
    loop = ReportLoop(told.release, interval_s=3600)
    loop.start()
    try:
        assert told.acquire(timeout=DEADLINE_S)
        loop.soon()
        assert told.acquire(timeout=DEADLINE_S)
    finally:
        loop.stop()
    assert not told.acquire(timeout=0), "stopping tells nothing"
