"""Which nodes expert hosts go to, and which host is one too many where. Pure.

Nodes fail and are emptied as a whole, and their memory and processors are shared by what runs there: hosts are spread.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

_UNEVEN = 2  # hosts between the fullest and the emptiest node: to move one of one would change nothing


def deal_nodes(nodes: Iterable[str], count: int) -> tuple[str | None, ...]:
    """A node for each of so many hosts, in turn; None for each where no node is known."""
    order = sorted(nodes)
    return tuple(order[index % len(order)] if order else None for index in range(count))


def emptiest_node(nodes: Iterable[str], node_by_host: Mapping[int, str]) -> str | None:
    """Where one more host is best; None: nowhere."""
    placed = list(node_by_host.values())
    return min(sorted(nodes), key=placed.count, default=None)


def is_uneven(nodes: Collection[str], node_by_host: Mapping[int, str]) -> bool:
    """Whether one host more on the emptiest of these nodes, and one less on the fullest, would spread them better."""
    counts = [list(node_by_host.values()).count(node) for node in nodes]
    return len(counts) > 1 and max(counts) - min(counts) >= _UNEVEN


def surplus_host(staying: Sequence[int], node_by_host: Mapping[int, str]) -> int:
    """Which of these hosts leaves: one of the fullest node, the last of them by number."""
    placed = [node_by_host.get(index) for index in staying]
    return max(staying, key=lambda index: (placed.count(node_by_host.get(index)), index))


def usable_nodes(nodes: Iterable[Mapping[str, Any]], needed: Mapping[str, float]) -> frozenset[str]:
    """Ids of living nodes that have what a host needs. Args: nodes: as ray.nodes() gives them."""
    return frozenset(
        str(node["NodeID"])
        for node in nodes
        if node["Alive"] and all(node["Resources"].get(name, 0) >= amount for name, amount in needed.items())
    )
