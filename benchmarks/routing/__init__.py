"""Routing: which worker gets a request, and how many experts are loaded for that."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="routing",
        module="benchmarks.routing.routing",
        description="Experts loaded for a generated token by way of routing, four workers in replay",
        targets="loads over those of other ways, balance of workers, a change of the mix, null cases",
        meaning=(
            "Requests of one kind use the same experts, so a worker with few kinds loads fewer of them; `/ random` is "
            "the loads as a share of those when workers are chosen by chance. The columns max/mean say what that "
            "costs in balance between workers."
        ),
    ),
    Benchmark(
        name="routing_live",
        module="benchmarks.routing.routing_live",
        description="Experts loaded for a generated token by way of routing, two real workers",
        targets="fewer loads than other ways",
        meaning=(
            "The same requests in the same order go to a server of each way of routing, which begins with empty "
            "memories. The loads are the workers' own counters, so they are what a user's server would load."
        ),
        in_make_bench=False,
    ),
)
