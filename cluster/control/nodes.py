"""Which node a person means. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from cluster.errors import InvalidRequest

_LEAST = 4  # characters of an id that may stand for it


def find_node(name: str, nodes: Sequence[Mapping[str, Any]], known: Iterable[str] = ()) -> str:
    """The id of the node that a person means.

    Args:
        name: its id or how that begins, its address or its host name.
        nodes: as ray.nodes() gives them; only living ones count.
        known: ids of other nodes that may be meant.
    Raises:
        InvalidRequest: none, or more than one; names those there are.
    """
    living = [node for node in nodes if node["Alive"]]
    found = {
        str(node["NodeID"])
        for node in living
        if name in (node["NodeManagerAddress"], node["NodeManagerHostname"]) or _is_id(name, node["NodeID"])
    }
    found |= {node_id for node_id in known if _is_id(name, node_id)}
    if len(found) != 1:
        there = ", ".join(f"{node['NodeID'][:12]} ({node['NodeManagerAddress']})" for node in living)
        raise InvalidRequest(f"{len(found) or 'no'} nodes are called {name!r}; there are {there}", param="node")
    return found.pop()


def _is_id(name: str, node_id: str) -> bool:
    return name == node_id or (len(name) >= _LEAST and node_id.startswith(name))
