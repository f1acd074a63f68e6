"""What every benchmark shares: targets, tables, JSON, the load average, the wide model, memory bandwidth."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

REPOSITORY = Path(__file__).resolve().parent.parent
DEMO = REPOSITORY / "models" / "moesaic-demo"
SHARED_PROMPTS = REPOSITORY.parent / "shared" / "data" / "prompts"


@dataclass(frozen=True, slots=True)
class Target:
    """A number the project promised; `met` is computed from `value`, never typed."""

    name: str
    target: str
    value: float
    met: bool


@dataclass(slots=True)
class Report:
    """Rows of a table, targets, and the circumstances."""

    title: str
    rows: list[dict[str, Any]] = field(default_factory=list)
    targets: list[Target] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    load_before: tuple[float, float, float] = field(default_factory=os.getloadavg)

    def at_least(self, name: str, value: float, bound: float) -> None:
        """Record a target of the form value >= bound."""
        self.targets.append(Target(name, f">= {bound:g}", value, value >= bound))

    def at_most(self, name: str, value: float, bound: float) -> None:
        """Record a target of the form value <= bound."""
        self.targets.append(Target(name, f"<= {bound:g}", value, value <= bound))

    def finish(self, *, as_json: bool) -> int:
        """Print; the exit code is 0 if every target was met, else 1."""
        if as_json:
            print(
                json.dumps(
                    {
                        "title": self.title,
                        "rows": self.rows,
                        "targets": [asdict(target) for target in self.targets],
                        "notes": self.notes,
                        "machine": machine(),
                        "load_average": {"before": self.load_before, "after": os.getloadavg()},
                    },
                    indent=2,
                )
            )
        else:
            self._print_tables()
        return 0 if all(target.met for target in self.targets) else 1

    def _print_tables(self) -> None:
        console = Console(width=150)
        table = Table(*self.rows[0], title=self.title) if self.rows else Table(title=self.title)
        for row in self.rows:
            table.add_row(*(f"{value:.4g}" if isinstance(value, float) else str(value) for value in row.values()))
        console.print(table)
        targets = Table("target", "wanted", "measured", "met", title="Targets")
        for t in self.targets:
            targets.add_row(t.name, t.target, f"{t.value:.4g}", "yes" if t.met else "NO")
        if self.targets:
            console.print(targets)
        for note in self.notes:
            console.print(note)
        before, after = self.load_before[0], os.getloadavg()[0]
        console.print(f"{machine()}; load average {before:.2f} before, {after:.2f} after")


def arguments(description: str) -> argparse.ArgumentParser:
    """A parser with the flags that every benchmark takes."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--quick", action="store_true", help="the same work, smaller: under three minutes")
    return parser


def progress(line: str) -> None:
    """A line for a person who waits; goes to standard error."""
    print(line, file=sys.stderr, flush=True)


def machine() -> str:
    """Processor name and number of cores."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{os.cpu_count()} cores"


def wide_model(factor: int) -> Path:
    """A function-preserving copy of the demo model whose experts are `factor` times as large (made once)."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "moesaic"
    target = cache / f"moesaic-demo-{factor}x"
    if not target.is_dir():
        from actors.convert.widen import widen_checkpoint

        progress(f"writing {target}")
        cache.mkdir(parents=True, exist_ok=True)
        widen_checkpoint(DEMO, target, factor=factor)
    return target


def prompts_of(domain: str) -> list[str]:
    """The shared prompts of a domain."""
    file = SHARED_PROMPTS / f"{domain}.jsonl"
    if not file.is_file():
        raise SystemExit(f"{file} is not there; this benchmark needs the shared prompts")
    return [json.loads(line)["prompt"] for line in file.read_text().rstrip("\n").split("\n")]


def prompts_of_domains(num: int) -> list[str]:
    """`num` prompts, domain after domain: the shared ones when they are there, else the bundled ones."""
    if SHARED_PROMPTS.is_dir():
        files = sorted(SHARED_PROMPTS.glob("*.jsonl"))
        per_domain = [
            [json.loads(line)["prompt"] for line in f.read_text().rstrip("\n").split("\n")[:num]] for f in files
        ]
        mixed = [domain[i] for i in range(num) for domain in per_domain if i < len(domain)]
        return mixed[:num]
    from cluster.loadgen.prompts import BUNDLED_PROMPTS

    return [BUNDLED_PROMPTS[i % len(BUNDLED_PROMPTS)] for i in range(num)]


def memory_bandwidth(num_bytes: int = 512 * 2**20) -> float:
    """Bytes per second at which one core reads memory: the best of several passes of the streaming kernel's own
    access pattern (eight streams, huge pages), so that it is a bound and not another program's speed."""
    from actors.kernels.native import load_native

    native = load_native()
    if native is None:
        block = np.ones(num_bytes // 8, dtype=np.int64)
        return max(num_bytes / _timed(block.sum) for _ in range(5))
    return max(native.read_bandwidth(num_bytes) for _ in range(5))


def _timed(run: Any) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def median(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    return statistics.median(values) if values else 0.0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Both sides of a comparison compute on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
