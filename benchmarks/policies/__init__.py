"""Policies: what to keep of the experts and what to fetch ahead, in replay."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="policies",
        module="benchmarks.policies.policies",
        description="Cache and prefetch policies in replay of recorded traces, ours beside published ones",
        targets="hit rate and time per token over the best other policy, share of the gap to the bounds, null cases",
        meaning=(
            "A higher hit rate means fewer experts that a token waits for, and a lower time per output token (TPOT) is "
            "what the user sees of it, at each speed of the link. `belady` and `oracle` know the future and are "
            "bounds, not policies."
        ),
    ),
)
