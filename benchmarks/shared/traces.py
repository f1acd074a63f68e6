"""Gate traces for benchmarks that replay: recorded once with the demo model, halves of the prompts of every domain."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path

from benchmarks.shared.command_line import progress
from benchmarks.shared.models import cache_folder
from benchmarks.shared.prompts import SHARED_PROMPTS, entries_of
from cluster.policies.trace import GateTrace

_PROMPTS_PER_DOMAIN = 24


def both_traces(past: Path | None, held_out: Path | None) -> tuple[Path, Path]:
    """To learn from and to replay: given, or recorded from the shared prompts (else the bundled ones)."""
    cache, half = cache_folder(), _PROMPTS_PER_DOMAIN // 2
    return (
        past or _recorded(cache / "policies-past.npz", slice(0, half), seed=0),
        held_out or _recorded(cache / "policies-held-out.npz", slice(half, 2 * half), seed=1000),
    )


def first_of_each_domain(trace: GateTrace, count: int) -> GateTrace:
    """A trace of the first `count` requests of every domain."""
    seen: dict[str, int] = {}
    chosen: list[int] = []
    for index, request in enumerate(trace.requests):
        seen[request.domain] = seen.get(request.domain, 0) + 1
        if seen[request.domain] <= count:
            chosen.append(index)
    return trace.select(chosen)


def _recorded(path: Path, part: slice, *, seed: int) -> Path:
    if path.is_file():
        return path
    from cluster.cli.trace import record

    progress(f"recording {path}")
    with tempfile.NamedTemporaryFile("w", suffix=".jsonl") as prompts:
        prompts.writelines(json.dumps(entry) + "\n" for entry in _prompts(part))
        prompts.flush()
        record(prompts=Path(prompts.name), out=path, threads=1, seed=seed)
    return path


def _prompts(part: slice) -> list[dict[str, str]]:
    if SHARED_PROMPTS.is_dir():
        files = sorted(SHARED_PROMPTS.glob("*.jsonl"))
        return [entry for file in files for entry in entries_of(file)[part]]
    from cluster.loadgen.prompts import BUNDLED_PROMPTS

    return [{"prompt": text, "domain": "bundled"} for text in BUNDLED_PROMPTS[part.start != 0 :: 2]]
