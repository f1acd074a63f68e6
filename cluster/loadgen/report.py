"""Numbers of one load run. Pure: timings in, report out. Knows seconds and tokens; knows no server."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cluster.loadgen.client import RequestTiming

if TYPE_CHECKING:
    from rich.table import Table


@dataclass(frozen=True, slots=True, kw_only=True)
class Objectives:
    """Service level objectives in milliseconds; None is not asked for."""

    ttft_ms: float | None = None
    tpot_ms: float | None = None
    e2e_ms: float | None = None

    def as_dict(self) -> dict[str, float]:
        """Those that are asked for."""
        given = {"ttft_ms": self.ttft_ms, "tpot_ms": self.tpot_ms, "e2e_ms": self.e2e_ms}
        return {name: value for name, value in given.items() if value is not None}


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """How one duration is distributed, in milliseconds."""

    mean: float
    p50: float
    p90: float
    p99: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Goodput:
    """Requests that succeeded and met every objective."""

    objectives: Mapping[str, float]
    requests_per_s: float
    fraction: float


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """A load run in numbers. Latencies are of completed requests only; failures are counted by code.

    TTFT: to the first text. ITL: between events with text. TPOT: (E2E - TTFT) / (tokens - 1). E2E: to the end.
    """

    num_requests: int
    num_completed: int
    failures: Mapping[str, int]
    duration_s: float
    prompt_tokens: int
    output_tokens: int
    requests_per_s: float
    output_tokens_per_s: float
    ttft_ms: Spread | None
    tpot_ms: Spread | None
    itl_ms: Spread | None
    e2e_ms: Spread | None
    max_send_lag_ms: float
    goodput: Goodput | None

    def to_json(self) -> dict[str, Any]:
        """Plain values for `json.dumps`."""
        from dataclasses import asdict

        return asdict(self)

    def to_table(self) -> Table:
        """For people."""
        from rich.table import Table

        table = Table("", "mean", "p50", "p90", "p99", title=self._title(), min_width=76)
        spreads = (("TTFT", self.ttft_ms), ("TPOT", self.tpot_ms), ("ITL", self.itl_ms), ("E2E", self.e2e_ms))
        for name, spread in spreads:
            values = [f"{value:.1f}" for value in _values(spread)] if spread else ["-"] * 4
            table.add_row(f"{name} ms", *values)
        table.caption = self._caption()
        return table

    def _title(self) -> str:
        return (
            f"{self.num_completed} of {self.num_requests} requests in {self.duration_s:.1f} s: "
            f"{self.requests_per_s:.2f} requests/s, {self.output_tokens_per_s:.1f} tokens/s"
        )

    def _caption(self) -> str:
        parts: list[str] = []
        if self.goodput is not None:
            wanted = ", ".join(f"{name} <= {value:g}" for name, value in self.goodput.objectives.items())
            parts.append(f"goodput ({wanted}): {self.goodput.requests_per_s:.2f}/s, {self.goodput.fraction:.0%}")
        if self.failures:
            parts.append("failures: " + ", ".join(f"{code} x{count}" for code, count in self.failures.items()))
        return "; ".join(parts)


def build_report(
    timings: Sequence[RequestTiming], *, duration_s: float, objectives: Objectives | None = None
) -> LoadReport:
    """The report of one run of `duration_s` wall seconds."""
    done = [timing for timing in timings if timing.error is None]
    output_tokens = sum(timing.output_tokens for timing in done)
    failures = Counter(timing.error for timing in timings if timing.error is not None)
    tpots_s = [tpot for timing in done if (tpot := _tpot_s(timing)) is not None]
    return LoadReport(
        num_requests=len(timings),
        num_completed=len(done),
        failures=dict(sorted(failures.items())),
        duration_s=duration_s,
        prompt_tokens=sum(timing.prompt_tokens for timing in done),
        output_tokens=output_tokens,
        requests_per_s=_per_s(len(done), duration_s),
        output_tokens_per_s=_per_s(output_tokens, duration_s),
        ttft_ms=_spread([timing.ttft_s for timing in done if timing.ttft_s is not None]),
        tpot_ms=_spread(tpots_s),
        itl_ms=_spread([gap for timing in done for gap in timing.gaps_s]),
        e2e_ms=_spread([timing.e2e_s for timing in done]),
        max_send_lag_ms=1000 * max((timing.send_lag_s for timing in timings), default=0.0),
        goodput=_goodput(timings, duration_s, objectives),
    )


def percentile(values: Sequence[float], percent: float) -> float:
    """Linear interpolation between the two nearest of the sorted values (numpy's default)."""
    ordered = sorted(values)
    position = (len(ordered) - 1) * percent / 100
    below = int(position)
    above = min(below + 1, len(ordered) - 1)
    return ordered[below] + (ordered[above] - ordered[below]) * (position - below)


def _spread(values_s: Sequence[float]) -> Spread | None:
    if not values_s:
        return None
    values_ms = [1000 * value for value in values_s]
    p50, p90, p99 = (percentile(values_ms, percent) for percent in (50, 90, 99))
    return Spread(mean=sum(values_ms) / len(values_ms), p50=p50, p90=p90, p99=p99)


def _values(spread: Spread) -> tuple[float, ...]:
    return (spread.mean, spread.p50, spread.p90, spread.p99)


def _tpot_s(timing: RequestTiming) -> float | None:
    if timing.ttft_s is None or timing.output_tokens < 2:
        return None
    return (timing.e2e_s - timing.ttft_s) / (timing.output_tokens - 1)


def _goodput(timings: Sequence[RequestTiming], duration_s: float, objectives: Objectives | None) -> Goodput | None:
    wanted = objectives.as_dict() if objectives else {}
    if not wanted:
        return None
    num_good = sum(_is_good(timing, wanted) for timing in timings)
    fraction = num_good / len(timings) if timings else 0.0
    return Goodput(objectives=wanted, requests_per_s=_per_s(num_good, duration_s), fraction=fraction)


def _is_good(timing: RequestTiming, wanted: Mapping[str, float]) -> bool:
    """A single-token answer has no TPOT and cannot miss it."""
    if timing.error is not None:
        return False
    actual_s = {"ttft_ms": timing.ttft_s, "tpot_ms": _tpot_s(timing), "e2e_ms": timing.e2e_s}
    return all((value := actual_s[name]) is None or 1000 * value <= limit for name, limit in wanted.items())


def _per_s(count: int, duration_s: float) -> float:
    return count / duration_s if duration_s > 0 else 0.0
