"""One system: what workers know reaches the hosts that hold the experts."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="one_system",
        module="benchmarks.one_system.one_system",
        description="Loads that are waited for on hosts that follow workers, beside one process and beside LRU",
        targets="loads of one process with the same bytes, time per token beside hosts that evict by recency",
        meaning=(
            "Hosts see no gates; workers tell them what they expect. The row of one process has the same policy and "
            "the same bytes of memory in one place: hosts should load about as often."
        ),
    ),
)
