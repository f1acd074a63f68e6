"""Clients: programs of others against our server."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="clients",
        module="benchmarks.clients.clients",
        description="Foreign clients against moesaic serve, each in an environment of its own",
        targets="no client fails",
        meaning=(
            "Each row is a program that others wrote for OpenAI's interface, asked to do what it does, against our "
            "server. One that cannot be installed on this machine says nothing about the server."
        ),
        in_make_bench=False,
    ),
    Benchmark(
        name="vllm_entrypoints",
        module="benchmarks.clients.vllm_entrypoints",
        description="vLLM's own tests of its OpenAI interface against moesaic serve",
        targets="number of tests that remain, share of them that pass",
        meaning=(
            "The tests are vLLM's, with other names of models and other lengths. A test that is left out names the "
            "feature that we do not serve."
        ),
        in_make_bench=False,
        has_own_command=True,
    ),
)
