"""Arrival schedules: reproducible, in order, with the asked rate."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import pytest

from cluster.errors import InvalidRequest
from cluster.loadgen.arrivals import closed_loop, poisson, read_trace


def test_poisson_has_the_asked_rate_and_is_reproducible() -> None:
    schedule = poisson(rate_per_s=5.0, num_requests=4000, seed=7)
    times = [arrival.arrival_s for arrival in schedule.arrivals]
    assert times == sorted(times)
    assert times[-1] / 4000 == pytest.approx(0.2, rel=0.05)
    gaps = [later - earlier for earlier, later in pairwise(times)]
    mean = sum(gaps) / len(gaps)
    variance = sum((gap - mean) ** 2 for gap in gaps) / len(gaps)
    assert variance**0.5 == pytest.approx(mean, rel=0.1)  # an exponential's deviation is its mean
    assert poisson(rate_per_s=5.0, num_requests=4000, seed=7) == schedule
    assert poisson(rate_per_s=5.0, num_requests=4000, seed=8) != schedule
    assert schedule.concurrency is None


def test_closed_loop() -> None:
    schedule = closed_loop(concurrency=3, num_requests=5)
    assert len(schedule.arrivals) == 5
    assert schedule.concurrency == 3


def test_trace_is_sorted_shifted_and_scaled(tmp_path: Path) -> None:
    path = tmp_path / "trace.csv"
    path.write_text("arrival_s,input_tokens,output_tokens,note\n12.0,30,3,c\n10.0,10,1,a\n11.0,20,2,b\n")
    arrivals = read_trace(path, time_scale=0.5).arrivals
    assert [(a.arrival_s, a.input_tokens, a.output_tokens) for a in arrivals] == [
        (0.0, 10, 1),
        (0.5, 20, 2),
        (1.0, 30, 3),
    ]
    assert len(read_trace(path, num_requests=2).arrivals) == 2


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("arrival_s,input_tokens\n1,2\n", "column output_tokens is missing"),
        ("arrival_s,input_tokens,output_tokens\n1,2,3\n1,x,3\n", "line 3"),
        ("arrival_s,input_tokens,output_tokens\n1,2\n", "line 2"),
        ("arrival_s,input_tokens,output_tokens\n", "no requests"),
    ],
)
def test_bad_traces_are_named(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "trace.csv"
    path.write_text(text)
    with pytest.raises(InvalidRequest, match=message):
        read_trace(path)


def test_bad_arguments() -> None:
    with pytest.raises(InvalidRequest, match="rate"):
        poisson(rate_per_s=0, num_requests=1)
    with pytest.raises(InvalidRequest, match="concurrency"):
        closed_loop(concurrency=0, num_requests=1)
    with pytest.raises(InvalidRequest, match=r"none\.csv"):
        read_trace(Path("/none.csv"))
