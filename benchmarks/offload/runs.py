"""One side's child process from start to end: confined, listened to, watched, ended."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from benchmarks.offload import side
from benchmarks.offload.confinement import Confinement, Limits, drop_page_cache, end, read_blkio_bytes
from benchmarks.offload.side import Task
from benchmarks.offload.steps import Step
from benchmarks.shared.models import REPOSITORY

_LOAD_LIMIT_S = 300.0
_GRACE_S = 60.0
_POLL_S = 0.02


@dataclass(slots=True)
class Run:
    """One child's life. held_bytes: weights and KV cache in its own memory; peak_bytes: of its memory without the page
    cache; disk_bytes: what it made the disk move, start included; failure: None, or why it ended early."""

    held_bytes: int = 0
    load_s: float = 0.0
    peak_bytes: int = 0
    disk_bytes: int = 0
    steps: list[Step] = field(default_factory=list)
    failure: str | None = None

    def first_tokens(self, count: int) -> list[tuple[int, int]]:
        """The first tokens of the first prompt."""
        return [token for step in self.steps for token in step.tokens if token[0] == 0][:count]


def execute(task: Task, limits: Limits, files: Sequence[Path], *, permitted: bool) -> Run:
    """Run a side cold. Args: files: what the page cache must not hold at its start."""
    drop_page_cache(files)
    confinement = Confinement(f"moesaic-{os.getpid()}-{time.monotonic_ns()}", limits, permitted=permitted)
    counter = confinement.counter_of_reads
    task = replace(task, blkio_counter=str(counter or ""), device=limits.device)
    with tempfile.TemporaryFile("w+") as errors:
        try:
            child = confinement.start(
                [sys.executable, "-m", side.__name__, json.dumps(asdict(task))],
                {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(REPOSITORY)},
                errors,
            )
            try:
                run = _listen(child, confinement, task.limit_s)
            finally:
                end(child)
            if counter is not None:
                run.disk_bytes = read_blkio_bytes(counter, limits.device)
            if run.failure is None and child.returncode:
                errors.seek(0)
                run.failure = _why(child.returncode, confinement, errors.read())
        finally:
            confinement.close()
    return run


def _listen(child: subprocess.Popen[str], confinement: Confinement, limit_s: float) -> Run:
    lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
    threading.Thread(target=_forward, args=(child, lines), daemon=True).start()
    run, deadline = Run(), time.monotonic() + _LOAD_LIMIT_S
    while True:
        run.peak_bytes = max(run.peak_bytes, confinement.own_bytes())
        try:
            line = lines.get(timeout=_POLL_S)
        except queue.Empty:
            if time.monotonic() > deadline:
                run.failure = f"ended here: {'no step in time' if run.load_s else f'not loaded in {_LOAD_LIMIT_S:g} s'}"
                return run
            continue
        if line is None:
            child.wait(timeout=_GRACE_S)
            return run
        if not line.startswith("{"):
            continue
        message = json.loads(line)
        if "loaded" in message:
            run.held_bytes, run.load_s = message["loaded"]["held_bytes"], message["loaded"]["seconds"]
            deadline = time.monotonic() + limit_s + _GRACE_S
        elif "step" in message:
            run.steps.append(Step.from_dict(message["step"]))


def _forward(child: subprocess.Popen[str], lines: queue.SimpleQueue[str | None]) -> None:
    assert child.stdout is not None
    for line in child.stdout:
        lines.put(line)
    lines.put(None)


def _why(returncode: int, confinement: Confinement, errors: str) -> str:
    if confinement.out_of_memory():
        return "killed: out of memory"
    last = [line for line in errors.splitlines() if line.strip()][-1:]
    return f"ended with {returncode}: {last[0][:200] if last else 'nothing on its standard error'}"
