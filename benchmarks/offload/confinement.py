"""One child process in a memory cgroup and behind a block-I/O throttle (cgroup v1), and its end.

The throttle of v1 holds for direct reads and for page faults alike; writes that the page cache does later escape it,
and nobody here writes. Everything made is removed again, processes by their own ids.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

_ROOT = Path("/sys/fs/cgroup")
_ENTER = 'for group in $GROUPS_TO_ENTER; do echo $$ > "$group/cgroup.procs" || exit 97; done; exec "$@"'
_TRIES = 50


@dataclass(frozen=True, slots=True)
class Limits:
    """What a child may use. None: no limit. device: MAJOR:MINOR of the disk that is throttled."""

    memory_bytes: int | None = None
    read_bytes_per_s: int | None = None
    device: str = ""


class Confinement:
    """A pair of cgroups for one child; without permission (`groups` empty) the child runs unconfined."""

    def __init__(self, name: str, limits: Limits, *, permitted: bool) -> None:
        """Raises OSError: the kernel refuses a limit."""
        self._memory = _own_group("memory") / name
        self._blkio = _own_group("blkio") / name
        self.groups: list[Path] = []
        if not permitted:
            return
        try:
            for group in (self._memory, self._blkio):
                group.mkdir()
                self.groups.append(group)
            if limits.memory_bytes is not None:
                (self._memory / "memory.limit_in_bytes").write_text(str(limits.memory_bytes))
            if limits.read_bytes_per_s is not None:
                rule = f"{limits.device} {limits.read_bytes_per_s}"
                (self._blkio / "blkio.throttle.read_bps_device").write_text(rule)
        except OSError:
            self.close()
            raise

    @property
    def counter_of_reads(self) -> Path | None:
        """File with the bytes that the child made the disk move, page faults included."""
        return self._blkio / "blkio.throttle.io_service_bytes" if self.groups else None

    def start(
        self, command: Sequence[str], environment: dict[str, str], errors: IO[str] | int = subprocess.PIPE
    ) -> subprocess.Popen[str]:
        """Start a child that enters the cgroups before it becomes `command`."""
        return subprocess.Popen(
            ["/bin/sh", "-c", _ENTER, "sh", *command],
            env={**os.environ, **environment, "GROUPS_TO_ENTER": " ".join(map(str, self.groups))},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
            start_new_session=True,
        )

    def own_bytes(self) -> int:
        """Memory charged to the child but for the page cache: what it cannot give back."""
        if not self.groups:
            return 0
        stat = dict(line.split() for line in (self._memory / "memory.stat").read_text().splitlines())
        return int((self._memory / "memory.usage_in_bytes").read_text()) - int(stat["total_cache"])

    def out_of_memory(self) -> bool:
        """Whether the kernel killed for want of memory."""
        if not self.groups:
            return False
        lines = (self._memory / "memory.oom_control").read_text().splitlines()
        return any(line.startswith("oom_kill ") and line != "oom_kill 0" for line in lines)

    def close(self) -> None:
        """End what is left inside and remove the cgroups."""
        for group in self.groups:
            for pid in (group / "cgroup.procs").read_text().split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), signal.SIGKILL)
        for group in self.groups:
            _remove(group)
        self.groups = []


def read_blkio_bytes(counter: Path, device: str) -> int:
    """Bytes read from `device` by the cgroup's count."""
    for line in counter.read_text().splitlines():
        if line.startswith(f"{device} Read "):
            return int(line.split()[2])
    return 0


def disk_of(path: Path) -> str:
    """MAJOR:MINOR of the whole disk that holds `path` (throttles are per disk, not per partition)."""
    number = path.stat().st_dev
    node = Path(f"/sys/dev/block/{os.major(number)}:{os.minor(number)}")
    if (node / "partition").is_file():
        return (node.resolve().parent / "dev").read_text().strip()
    return f"{os.major(number)}:{os.minor(number)}"


def read_ahead_kb(device: str) -> int:
    """How far the kernel reads ahead of a page fault on a disk, if nothing else is said."""
    return int(Path(f"/sys/dev/block/{device}/queue/read_ahead_kb").read_text())


def why_not_permitted(path: Path) -> str | None:
    """None if children can be confined and the disk under `path` throttled, else the reason."""
    try:
        trial = Confinement(f"moesaic-probe-{os.getpid()}", Limits(2**30, 2**30, disk_of(path)), permitted=True)
    except OSError as error:
        return str(error)
    trial.close()
    return None


def measured_read_rate(path: Path, limits: Limits, num_bytes: int) -> float:
    """Bytes per second of direct reads of `path` in a child under `limits`."""
    confinement = Confinement(f"moesaic-rate-{os.getpid()}", limits, permitted=True)
    try:
        child = confinement.start([sys.executable, "-c", _READER, str(path), str(num_bytes)], {})
        out, errors = child.communicate(timeout=600)
    finally:
        confinement.close()
    if child.returncode:
        raise OSError(f"reading {path} directly: {errors.strip()[-200:]}")
    return float(out)


_READER = """
import mmap, os, sys, time
fd, wanted, done = os.open(sys.argv[1], os.O_RDONLY | os.O_DIRECT), int(sys.argv[2]), 0
block, began = mmap.mmap(-1, 1 << 20), time.perf_counter()
while done < wanted and (got := os.preadv(fd, [block], done)):
    done += got
print(done / (time.perf_counter() - began))
"""


def drop_page_cache(paths: Sequence[Path]) -> None:
    """Write back and drop what the page cache holds of some files (folders: of all files in them)."""
    for path in paths:
        for file in [f for f in path.rglob("*") if f.is_file()] if path.is_dir() else [path]:
            fd = os.open(file, os.O_RDONLY)
            try:
                os.fsync(fd)
                os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(fd)


def end(child: subprocess.Popen[str]) -> None:
    """Kill a child that still runs, and wait for it."""
    if child.poll() is None:
        child.kill()
    child.wait(timeout=60)
    for stream in (child.stdout, child.stderr):
        _close(stream)


def _close(stream: IO[str] | None) -> None:
    if stream is not None:
        stream.close()


def _own_group(controller: str) -> Path:
    """This process's own cgroup of a controller: children are made below it, so that they stay inside its limits."""
    for line in Path("/proc/self/cgroup").read_text().splitlines():
        _, controllers, path = line.split(":", 2)
        if controller in controllers.split(","):
            return _ROOT / controller / path.lstrip("/")
    return _ROOT / controller


def _remove(group: Path) -> None:
    """A cgroup is busy until its last process is gone."""
    for _ in range(_TRIES):
        try:
            group.rmdir()
        except FileNotFoundError:
            return
        except OSError:
            time.sleep(0.1)
        else:
            return
    raise OSError(f"{group}: still in use; remove it by hand (rmdir)")
