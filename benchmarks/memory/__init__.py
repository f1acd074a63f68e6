"""Memory: the budget means what it says."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="memory",
        module="benchmarks.memory.memory",
        description="Resident memory and disk reads of the engine's process over many requests",
        targets="memory above the budget, growth, page cache, bytes read for each expert loaded",
        meaning=(
            "The process may take the bytes of its expert budget and a stated constant, and must not grow from request "
            "to request. Every expert that is loaded is read from disk once, and the checkpoint leaves no copy in the "
            "page cache."
        ),
    ),
)
