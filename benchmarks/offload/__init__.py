"""Offload: expert memory live, with policies over a declared link and beside peers on one throttled disk."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="offload",
        module="benchmarks.offload.offload",
        description="Expert memory live: every policy over a declared link, and peers on the same throttled disk",
        targets="agreement with replay, nothing lost when all fits, times the speed of llama.cpp and transformers",
        meaning=(
            "Part `live` shows what each policy makes of a slow link, and whether replay foretells it. Part `peers` "
            "gives every side the same bytes of memory and the same disk, so the ratio is what its way to keep and "
            "fetch experts is worth."
        ),
    ),
    Benchmark(
        name="ring",
        module="benchmarks.offload.ring",
        description="Time of long prompts with the ring of the next layers, and with the cache alone",
        targets="the two ways stand side by side",
        meaning=(
            "A long prompt uses nearly all experts of each layer, so a ring that loads the next layers' in order can "
            "beat a cache. The row `cache` is the same with the ring switched off."
        ),
    ),
)
