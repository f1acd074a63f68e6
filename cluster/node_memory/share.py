"""How much of a node's memory one process may take beside the others on it. Pure: facts in, bytes out.

Memory is taken as it is written, long after it was promised: what is free now is not free if others will fill it.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

SHARE = 0.7  # of free memory: the rest is for the processes themselves, activations and other programs


@dataclass(frozen=True, slots=True)
class MemoryLevel:
    """Memory that a limit leaves free: of the machine (group ""), or of a control group and all below it.

    free_bytes: limit less use; never below 0.
    """

    group: str
    free_bytes: int


@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseFacts:
    """What one process has promised itself. group: its control group.

    open_bytes: promised and not yet filled. is_settled: it asks for nothing more. family: of one deployed model.
    """

    group: str
    family: str
    open_bytes: int
    is_settled: bool


def open_bytes(*, promised: int, before: int, now: int) -> int:
    """Bytes of a promise that its process has yet to fill.

    Args: before, now: private memory of the process, when it began to fill and at present.
    """
    return min(promised, max(0, before + promised - now))


def unpromised_bytes(levels: Iterable[MemoryLevel], leases: Iterable[LeaseFacts]) -> int:
    """Free under every limit once all leases are filled; 0: nothing."""
    leases = tuple(leases)
    left = [
        level.free_bytes - sum(lease.open_bytes for lease in leases if is_within(lease.group, level.group))
        for level in levels
    ]
    return max(0, min(left)) if left else 0


def fair_share(free_bytes: int, others: Iterable[LeaseFacts], *, family: str, expected: int = 1) -> int:
    """Bytes that a process may take of what is unpromised, so that those which have not asked yet get as much.

    Args: others: leases of the other processes. family, expected: processes of this deployed model on the node, this
    one included, come or not.
    """
    others = tuple(others)
    pending = sum(not lease.is_settled for lease in others)
    settled = sum(lease.is_settled and lease.family == family for lease in others)
    return int(max(0, free_bytes) * SHARE / max(1 + pending, expected - settled))


def is_within(group: str, above: str) -> bool:
    """Whether a control group is another one, or below it; "" is above all."""
    above = above.rstrip("/")
    return not above or group == above or group.startswith(f"{above}/")
