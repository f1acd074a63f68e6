"""Statistics: what counting activations costs."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="activation_statistics",
        module="benchmarks.statistics.activation_statistics",
        description="What recording and flushing activation statistics costs a step",
        targets="share of step time, throughput with and without, and with a store that is gone",
        meaning=(
            "Every row compares the same work with and without counting which experts were chosen; outputs are equal "
            "and every count arrives. The shares are what placement, routing and prefetch pay for what they know."
        ),
    ),
)
