"""How many bytes the expert memory may take when nobody said so. Knows the machine's free memory, nothing else."""

from __future__ import annotations

import contextlib
from pathlib import Path

from cluster.sizes import AUTO, parse_cache_size

_SHARE = 0.7  # of free memory: the rest is for the process itself, activations and other programs
_CGROUP_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
_CGROUP_USAGE = ("/sys/fs/cgroup/memory.current", "/sys/fs/cgroup/memory/memory.usage_in_bytes")


def expert_budget(setting: str, *, total_bytes: int, kv_bytes: int) -> int:
    """Bytes of the expert memory. Args: setting: a size, a percentage of `total_bytes`, or `auto`.

    `auto` is all experts, or as many as fit in most of the memory that is free once the KV cache is full.
    """
    if setting != AUTO:
        return parse_cache_size(setting, total_bytes=total_bytes)
    return min(total_bytes, max(0, int((free_memory_bytes() - kv_bytes) * _SHARE)))


def free_memory_bytes() -> int:
    """Memory that new programs can have without swapping, by the kernel's estimate and this container's limit."""
    free: list[int] = []
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            free.append(int(line.split()[1]) * 1024)
    for limit, usage in zip(_CGROUP_LIMITS, _CGROUP_USAGE, strict=True):
        with contextlib.suppress(OSError, ValueError):  # absent, or "max"
            free.append(int(Path(limit).read_text()) - int(Path(usage).read_text()))
    return max(0, min(free)) if free else 0
