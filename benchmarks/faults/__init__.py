"""Faults: what a failure costs."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="drill",
        module="benchmarks.faults.drill",
        description="Three nodes under steady load, and one thing after the other killed, drained, cut off, healed",
        targets="no failed stream and no wrong token elsewhere, longest stall, time until all is there again",
        meaning=(
            "A stream may fail only if the front end that it came through was hit; all others must go on with right "
            "tokens. The times say how long they stand still, and when the cluster is whole again."
        ),
        in_make_bench=False,
    ),
)
