"""Where, when and of which code something was measured."""

from __future__ import annotations

import contextlib
import os
import subprocess
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from benchmarks.shared.models import REPOSITORY

_GIT_TIMEOUT_S = 20.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Circumstances:
    """command: what was run. load_before, load_after: the load average of the last minute."""

    command: str
    machine: str
    date: str
    commit: str
    load_before: float
    load_after: float

    @classmethod
    def now(cls, command: str, load_before: float) -> Circumstances:
        """Those of a run that has just ended."""
        return cls(
            command=command,
            machine=machine(),
            date=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
            commit=commit(),
            load_before=load_before,
            load_after=os.getloadavg()[0],
        )

    def lines(self) -> dict[str, str]:
        """For a table."""
        return {
            "machine": self.machine,
            "date": self.date,
            "commit": self.commit,
            "command": f"`{self.command}`",
            "load average": f"{self.load_before:.2f} before, {self.load_after:.2f} after",
        }


def machine() -> str:
    """Processor name and number of cores."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return f"{line.partition(':')[2].strip()}, {os.cpu_count()} cores"
    return f"{os.cpu_count()} cores"


def commit() -> str:
    """The commit of the working tree, and whether the code has changed since; pages of results do not count."""
    head = _git("rev-parse", "--short=12", "HEAD")
    if head is None:
        return "unknown: no git here"
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!docs/measured")
    return f"{head}, with changes that are not committed" if changed else head


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=REPOSITORY, capture_output=True, text=True, timeout=_GIT_TIMEOUT_S
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
