"""When requests arrive. Pure: same arguments, same schedule. Knows seconds and token counts; sends nothing."""

from __future__ import annotations

import csv
import random
from dataclasses import dataclass
from pathlib import Path

from cluster.errors import InvalidRequest


@dataclass(frozen=True, slots=True, kw_only=True)
class Arrival:
    """One request to send at `arrival_s` after the start; lengths are None where the caller chooses."""

    arrival_s: float
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Schedule:
    """Arrivals in order. `concurrency` set: closed loop, a request starts when a running one ends."""

    arrivals: tuple[Arrival, ...]
    concurrency: int | None = None


def poisson(*, rate_per_s: float, num_requests: int, seed: int = 0) -> Schedule:
    """Open loop with exponential gaps of mean 1 / `rate_per_s`; the first request comes after one gap."""
    if rate_per_s <= 0:
        raise InvalidRequest(f"rate must be above 0 requests per second, got {rate_per_s}", param="rate")
    generator = random.Random(seed)
    now_s = 0.0
    arrivals: list[Arrival] = []
    for _ in range(num_requests):
        now_s += generator.expovariate(rate_per_s)
        arrivals.append(Arrival(arrival_s=now_s))
    return Schedule(arrivals=tuple(arrivals))


def closed_loop(*, concurrency: int, num_requests: int) -> Schedule:
    """`concurrency` clients, each sending its next request when its last one ended."""
    if concurrency < 1:
        raise InvalidRequest(f"concurrency must be at least 1, got {concurrency}", param="concurrency")
    return Schedule(arrivals=(Arrival(arrival_s=0.0),) * num_requests, concurrency=concurrency)


def read_trace(path: Path, *, time_scale: float = 1.0, num_requests: int | None = None) -> Schedule:
    """Open loop from a CSV with columns arrival_s, input_tokens, output_tokens, sorted by time.

    The first request comes at 0; times are multiplied by `time_scale` (below 1 is faster).

    Raises:
        InvalidRequest: unreadable, a column is missing or a value is not a number; names file and line.
    """
    if time_scale <= 0:
        raise InvalidRequest(f"time scale must be above 0, got {time_scale}", param="time_scale")
    try:
        with path.open(newline="") as file:
            rows = [_trace_row(path, line, row) for line, row in enumerate(csv.DictReader(file), start=2)]
    except (OSError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"trace {path}: {error}", param="trace") from error
    if not rows:
        raise InvalidRequest(f"trace {path}: no requests in it", param="trace")
    rows.sort(key=lambda arrival: arrival.arrival_s)
    start_s = rows[0].arrival_s
    return Schedule(
        arrivals=tuple(
            Arrival(
                arrival_s=(row.arrival_s - start_s) * time_scale,
                input_tokens=row.input_tokens,
                output_tokens=row.output_tokens,
            )
            for row in rows[:num_requests]
        )
    )


def _trace_row(path: Path, line: int, row: dict[str, str]) -> Arrival:
    try:
        return Arrival(
            arrival_s=float(row["arrival_s"]),
            input_tokens=int(row["input_tokens"]),
            output_tokens=int(row["output_tokens"]),
        )
    except KeyError as error:
        raise InvalidRequest(f"trace {path}: column {error.args[0]} is missing", param="trace") from error
    except (TypeError, ValueError) as error:
        raise InvalidRequest(f"trace {path}, line {line}: {error}", param="trace") from error
