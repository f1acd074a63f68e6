"""What memory is free here: by the kernel's estimate, and by the limits of this process's control groups (v1 and v2).

Reads /proc and /sys, nothing else. Page cache that can be dropped counts as free: reading a checkpoint fills it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

from cluster.node_memory.share import MemoryLevel, unpromised_bytes

_UNLIMITED = 2**60  # v1 writes 9223372036854771712 for no limit


def free_memory_bytes() -> int:
    """Memory that new programs can have without swapping, under every limit."""
    return unpromised_bytes(memory_levels(), ())


def memory_levels(root: Path = Path("/")) -> tuple[MemoryLevel, ...]:
    """The machine and every control group above this process that has a limit. Args: root: of /proc and /sys."""
    levels: list[MemoryLevel] = []
    for line in (root / "proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            levels.append(MemoryLevel("", int(line.split()[1]) * 1024))
    for mount, group, is_v2 in _memory_groups(root):
        for each in (group, *group.parents):
            free = _free_in_group(mount / each.relative_to("/"), is_v2=is_v2)
            if free is not None:
                levels.append(MemoryLevel(str(each), free))
    return tuple(levels)


def control_group(root: Path = Path("/")) -> str:
    """The control group that counts this process's memory; "/" without any."""
    return next((str(group) for _, group, _ in _memory_groups(root)), "/")


def filled_bytes(pid: int, started: int, *, shared: bool = False) -> int | None:
    """Private memory that a process has filled, or `shared` memory; None unless it is the one that `started` then (see
    started_ticks)."""
    try:
        if started_ticks(pid) != started:
            return None
        status = Path(f"/proc/{pid}/status").read_text()
    except (OSError, ValueError):
        return None
    name = "RssShmem:" if shared else "RssAnon:"
    return sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith(name))


def started_ticks(pid: int) -> int:
    """When a process began, in ticks since boot: with its number, its identity.

    Raises:
        OSError: there is none.
    """
    text = Path(f"/proc/{pid}/stat").read_text()
    return int(text.rpartition(")")[2].split()[19])  # the name before it may have spaces and brackets


def _memory_groups(root: Path) -> Iterator[tuple[Path, PurePosixPath, bool]]:
    """Where the memory controller is mounted, this process's group there, and whether it is v2."""
    with contextlib.suppress(OSError):
        for line in (root / "proc/self/cgroup").read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            group = PurePosixPath("/") / path
            if ".." in group.parts:  # outside this namespace: what is mounted is the namespace's own group
                group = PurePosixPath("/")
            if "memory" in controllers.split(","):
                yield root / "sys/fs/cgroup/memory", group, False
            elif not controllers:
                yield root / "sys/fs/cgroup", group, True


def _free_in_group(directory: Path, *, is_v2: bool) -> int | None:
    """Limit less use; None: no limit, or no such group."""
    names = ("memory.max", "memory.high") if is_v2 else ("memory.limit_in_bytes",)
    limits = [limit for name in names if (limit := _number(directory / name)) is not None and limit < _UNLIMITED]
    used = _number(directory / ("memory.current" if is_v2 else "memory.usage_in_bytes"))
    if not limits or used is None:
        return None
    return max(0, min(limits) - max(0, used - _droppable(directory, is_v2=is_v2)))


def _droppable(directory: Path, *, is_v2: bool) -> int:
    """Page cache of a group, without what is shared memory."""
    prefix = "" if is_v2 else "total_"
    wanted = {f"{prefix}inactive_file", f"{prefix}active_file"}
    with contextlib.suppress(OSError, ValueError):
        pairs = (line.split() for line in (directory / "memory.stat").read_text().splitlines())
        return sum(int(pair[1]) for pair in pairs if pair[0] in wanted)
    return 0


def _number(path: Path) -> int | None:
    with contextlib.suppress(OSError, ValueError):  # absent, or "max"
        return int(path.read_text())
    return None
