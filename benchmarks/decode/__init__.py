"""Decoding: the engine's speed, and drawing tokens."""

from benchmarks.shared.declaration import Benchmark

BENCHMARKS = (
    Benchmark(
        name="decode",
        module="benchmarks.decode.decode",
        description="Decode speed of the engine beside transformers' generate",
        targets="times the speed of transformers, with one sequence and with eight",
        meaning=(
            "The ratio says how many times as fast as transformers our engine decodes, with the same model, prompts, "
            "precision and one thread each. The share of the bound says how near that is to what reading the weights "
            "of a step alone would take."
        ),
    ),
    Benchmark(
        name="sampling",
        module="benchmarks.decode.sampling",
        description="Time to draw the tokens of a step, compiled beside torch's sort",
        targets="milliseconds a step with top_p",
        meaning=(
            "Each row is the time to draw one token for every sequence of a step, by our compiled code and by torch, "
            "which have to draw the same tokens. Drawing is part of every step, so these milliseconds are added to "
            "every token of every sequence."
        ),
    ),
)
