"""Drawing tokens for 32 rows of a vocabulary of 152,000: the compiled draw beside torch's own sort.

Both sides get the same rows and the same noise, alternate on one thread, and have to give the same tokens. Times are of
the thread's own processor time, so that a neighbour on the machine does not count; wall time stands beside it.
"""

from __future__ import annotations

import time
from argparse import Namespace
from collections.abc import Callable
from typing import Any

import torch

from actors.engine.sampling import sample
from actors.kernels.sampling import load_sampling_kernel
from benchmarks.shared.command_line import progress
from benchmarks.shared.measuring import median, one_thread
from benchmarks.shared.report import Report
from cluster.types import SamplingParams

NUM_ROWS, VOCABULARY = 32, 152_000
BOUND_MS, GOAL_MS = 20.0, 8.0
FILTERS: dict[str, dict[str, Any]] = {
    "top_p 0.9": {"top_p": 0.9},
    "top_p 0.95, top_k 50": {"top_p": 0.95, "top_k": 50},
    "top_k 50": {"top_k": 50},
    "min_p 0.05": {"min_p": 0.05},
    "none": {},
}


def _logits(kind: str) -> torch.Tensor:
    """peaked: a few tokens carry most, as trained models have it. even: standard normal, the worst for a nucleus."""
    rows = torch.randn(NUM_ROWS, VOCABULARY, generator=torch.Generator().manual_seed(0))
    if kind == "peaked":
        rows *= 3
        rows[:, ::3000] += 12
    return rows


def _timed(run: Callable[[], list[int]]) -> tuple[list[int], float, float]:
    """What it gave, and milliseconds of the thread and of the clock."""
    wall, own = time.perf_counter(), time.thread_time()
    tokens = run()
    return tokens, 1e3 * (time.thread_time() - own), 1e3 * (time.perf_counter() - wall)


@one_thread()
def run(options: Namespace) -> Report:
    """Measure."""
    report = Report(f"One step of sampling, {NUM_ROWS} rows of {VOCABULARY:,}, ms of one thread")
    kernel = load_sampling_kernel()
    if kernel is None:
        raise SystemExit("the compiled kernels are not there; a C compiler is needed at install time")
    repeats = 3 if options.quick else 9
    slowest = 0.0
    for kind in ("peaked", "even"):
        logits = _logits(kind)
        for name, filters in FILTERS.items():
            progress(f"{kind}, {name}")
            ours, walls, theirs = [], [], []
            for repeat in range(repeats):
                params = [SamplingParams(max_tokens=1, temperature=0.8, seed=row, **filters) for row in range(NUM_ROWS)]
                rest = (params, [(0, repeat)] * NUM_ROWS, [()] * NUM_ROWS, [None] * NUM_ROWS)
                tokens, own, wall = _timed(lambda rest=rest, logits=logits: sample(logits, *rest, kernel)[0])
                expected, own_of_torch, _ = _timed(lambda rest=rest, logits=logits: sample(logits, *rest)[0])
                if tokens != expected:
                    raise SystemExit(f"{kind}, {name}: the two sides drew different tokens")
                ours.append(own)
                walls.append(wall)
                theirs.append(own_of_torch)
            report.rows.append(
                {
                    "logits": kind,
                    "filters": name,
                    "compiled": median(ours),
                    "compiled, wall": median(walls),
                    "torch": median(theirs),
                    "torch / compiled": median([b / a for a, b in zip(ours, theirs, strict=True)]),
                }
            )
            if "top_p" in filters:
                slowest = max(slowest, median(ours))
    report.at_most("top_p, ms a step", slowest, BOUND_MS)
    report.notes.append(f"goal: {GOAL_MS:g} ms")
    return report
