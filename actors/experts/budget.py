"""How many bytes an expert memory may take, by its setting. Knows sizes and this process's lease, nothing else."""

from __future__ import annotations

from cluster.config.sizes import AUTO, parse_cache_size
from cluster.node_memory.leases import MemoryLease


def expert_budget(setting: str, *, total_bytes: int, lease: MemoryLease, field: str, most: int | None = None) -> int:
    """Bytes of the expert memory, promised to this process. Args: setting: a size, a percentage of `total_bytes`, or
    `auto`. field: of the configuration. most: what `auto` need not exceed; default: all.

    `auto` is all experts, or as many as fit in this process's share of the memory that is promised to nobody.
    """
    if setting == AUTO:
        return lease.take(field, most=total_bytes if most is None else most)
    budget_bytes = parse_cache_size(setting, total_bytes=total_bytes)
    lease.book(field, min(budget_bytes, total_bytes))
    return budget_bytes
