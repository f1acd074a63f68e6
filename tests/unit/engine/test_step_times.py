"""Averages of what steps cost, decode and prefill apart."""

from __future__ import annotations

import pytest

from actors.engine.step_times import StepTimes


def test_decode_and_prefill_are_measured_apart() -> None:
    times = StepTimes()
    assert (times.decode_s, times.prefill_token_s) == (0.0, 0.0)

    times.note(4, 0, 0.1)
    times.note(0, 100, 0.5)
    assert (times.decode_s, times.prefill_token_s) == (0.1, 0.005)

    times.note(4, 100, 0.6)  # what decoding takes beside it is not the prompt's
    assert times.decode_s == 0.1
    assert times.prefill_token_s == pytest.approx(0.005)
    for _ in range(100):
        times.note(4, 0, 0.2)
    assert times.decode_s == pytest.approx(0.2, rel=1e-3)
