"""The expert data plane: what a round trip costs by carrier and size, and what it leaves of a step.

First, frames of 4 KB to 1 MB go to a host that answers with the rows it got, through everything a real host has
(handler, batching pool, device owner): shared memory, gRPC stream and Ray actor call reach the same process, in turn.
Beside them a collective as the usual alternative: broadcast, gather and barrier over gloo, between two processes.

Then one attention worker and one expert host, a thread each, against one process with two threads: same wide model,
and prompts, 8 sequences, alternating, warm. (In bfloat16 the dense products of two threads round differently, so the
tokens of the two sides may part; tests/integration/hosts/test_expert_hosts.py shows in float32 that hosts change no
token.)

    python -m benchmarks data_plane [--quick] [--json] [--factor 32]
"""

from __future__ import annotations

from argparse import ArgumentParser, Namespace

from benchmarks.data_plane.round_trips import measure_round_trips
from benchmarks.data_plane.steps import measure_steps
from benchmarks.shared.models import wide_model
from benchmarks.shared.report import Report


def add_options(parser: ArgumentParser) -> None:
    """Besides those of every benchmark."""
    parser.add_argument("--factor", type=int, default=32)


def run(options: Namespace) -> Report:
    """Measure."""
    rounds, block = (6, 40) if options.quick else (20, 100)
    report = Report("Data plane round trips (request and answer of the given size), microseconds")
    measure_round_trips(report, rounds, block)
    measure_steps(report, wide_model(options.factor), *((3, 24) if options.quick else (7, 64)))
    return report
