"""Data plane: token rows on their way between attention workers and expert hosts."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="data_plane",
        module="benchmarks.data_plane.data_plane",
        description="Round trips to an expert host by carrier and size, and what they leave of a step",
        targets="order of the carriers, microseconds of 64 KB by shared memory, share of one process's throughput",
        meaning=(
            "A layer whose experts are on another host waits for one round trip, so its microseconds are added to each "
            "layer of every token. The share of one process's throughput says what is left of it when the experts are "
            "in a process of their own."
        ),
    ),
)
