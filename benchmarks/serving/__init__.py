"""Serving: what HTTP costs."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="serving",
        module="benchmarks.serving.serving",
        description="HTTP streaming beside the engine's own throughput, and time to ready",
        targets="share of the engine's throughput that clients get; seconds until ready",
        meaning=(
            "The share says how much of the engine's own throughput reaches eight clients that stream over HTTP. What "
            "is missing is spent in the front end, the worker process and the way between them."
        ),
    ),
)
