"""Placement: which host has which experts, and moving them."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="placement",
        module="benchmarks.placement.placement",
        description="Balance of expert hosts by way of placement, planned on one period and scored on the next",
        targets="share of the gap to the oracle closed, no moves where nothing is to be gained, replicas' choice",
        meaning=(
            "The balance is the load of the busiest host over the mean: all others wait for it, so 1 is best. `gap "
            "closed` is our share of the way from contiguous blocks to an oracle that knows the second period; `-` "
            "means that there was next to nothing to gain."
        ),
    ),
    Benchmark(
        name="migration",
        module="benchmarks.placement.migration",
        description="What a step costs while experts move between hosts under load",
        targets="no failed request, equal tokens, ended migrations, bytes moved, slowest steps",
        meaning=(
            "Steps are timed in quiet stretches and while a third of the layers' experts move to the next host. The "
            "ratio of their slowest percent is what users notice of a migration, and their tokens must be equal."
        ),
    ),
)
