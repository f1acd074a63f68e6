"""Reports: percentiles, throughput and goodput on data whose answers are known."""

from __future__ import annotations

import json

import pytest

from cluster.loadgen.client import RequestTiming
from cluster.loadgen.report import Objectives, build_report, percentile


def test_percentiles_are_exact() -> None:
    values = [float(value) for value in range(100, -1, -1)]
    assert [percentile(values, percent) for percent in (0, 50, 90, 99, 100)] == [0, 50, 90, 99, 100]
    assert percentile([1.0, 2.0], 50) == 1.5
    assert percentile([1.0, 2.0, 4.0], 75) == 3.0
    assert percentile([7.0], 99) == 7.0


def _timing(ttft_s: float, e2e_s: float, tokens: int) -> RequestTiming:
    return RequestTiming(ttft_s=ttft_s, e2e_s=e2e_s, gaps_s=(0.01, 0.03), prompt_tokens=4, output_tokens=tokens)


def test_report_counts_and_rates() -> None:
    timings = [
        _timing(0.1, 0.3, 11),  # TPOT 20 ms
        _timing(0.2, 0.7, 11),  # TPOT 50 ms
        _timing(0.3, 0.3, 1),  # no TPOT
        RequestTiming(e2e_s=0.0, error="429"),
        RequestTiming(e2e_s=9.0, error="timeout"),
        RequestTiming(e2e_s=0.0, error="429"),
    ]
    report = build_report(timings, duration_s=2.0, objectives=Objectives(ttft_ms=250, tpot_ms=40))
    assert report.num_requests == 6
    assert report.num_completed == 3
    assert report.failures == {"429": 2, "timeout": 1}
    assert report.requests_per_s == 1.5
    assert report.output_tokens_per_s == 11.5
    assert report.prompt_tokens == 12
    assert report.ttft_ms is not None and report.ttft_ms.p50 == pytest.approx(200)
    assert report.tpot_ms is not None and report.tpot_ms.p50 == pytest.approx(35)
    assert report.itl_ms is not None and report.itl_ms.mean == pytest.approx(20)
    assert report.e2e_ms is not None and report.e2e_ms.p90 == pytest.approx(620)
    assert report.goodput is not None
    assert report.goodput.requests_per_s == 0.5  # the second misses TPOT, the third TTFT, three failed
    assert report.goodput.fraction == pytest.approx(1 / 6)
    assert json.loads(json.dumps(report.to_json()))["failures"] == {"429": 2, "timeout": 1}
    table = report.to_table()
    assert table.row_count == 4
    assert "429 x2" in str(table.caption)


def test_nothing_completed() -> None:
    report = build_report([RequestTiming(e2e_s=0.1, error="connection")], duration_s=1.0)
    assert report.ttft_ms is None
    assert report.goodput is None
    assert report.to_table().row_count == 4


def test_no_requests() -> None:
    assert build_report([], duration_s=0.0, objectives=Objectives(e2e_ms=1)).requests_per_s == 0.0
