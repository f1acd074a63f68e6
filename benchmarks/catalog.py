"""All benchmarks, topic by topic."""

from __future__ import annotations

from collections.abc import Mapping

from benchmarks import (
    clients,
    data_plane,
    decode,
    faults,
    memory,
    offload,
    one_system,
    placement,
    policies,
    routing,
    serving,
)
from benchmarks import statistics as statistics_topic
from benchmarks.shared.declaration import Benchmark

TOPICS = (
    decode,
    serving,
    memory,
    data_plane,
    statistics_topic,
    policies,
    offload,
    one_system,
    placement,
    routing,
    faults,
    clients,
)
BENCHMARKS: dict[str, Benchmark] = {benchmark.name: benchmark for topic in TOPICS for benchmark in topic.BENCHMARKS}


def listing(benchmarks: Mapping[str, Benchmark]) -> str:
    """A line for each."""
    width = max(map(len, benchmarks))
    return "".join(f"{benchmark.name:{width}}  {benchmark.description}\n" for benchmark in benchmarks.values())
