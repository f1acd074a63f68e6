"""Which nodes lend memory to the experts of others, and which experts each of them keeps. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.placement import even_placement
from cluster.types import ExpertId, Phase


def choose_shelf_nodes(
    nodes: Mapping[str, Mapping[str, float]], computing: Sequence[Mapping[str, float]]
) -> tuple[str, ...]:
    """Nodes that keep experts for others, in a fixed order: those where nothing that computes experts can be placed.

    Are there none such, all nodes: each is another node to the others. A node alone has no other.

    Args:
        nodes: resources of every living node, by node id.
        computing: resources that each kind of process that computes experts asks for.
    """
    if len(nodes) < 2:
        return ()
    idle = [node for node, has in nodes.items() if not any(_fits(needs, has) for needs in computing)]
    return tuple(sorted(idle or nodes))


def shelf_share(
    layers: Sequence[int],
    num_experts: int,
    *,
    shelf: int,
    num_shelves: int,
    capacity: int,
    counts: Mapping[Phase, Mapping[int, Mapping[int, int]]],
) -> list[ExpertId]:
    """The experts that shelf number `shelf` keeps, in the order in which it takes them in.

    All experts are dealt out to the shelves first, whatever the counts, so that shelves need not agree on counts that
    change while they start: no expert is kept twice. Of its own experts a shelf keeps the most used; those used equally
    often, which is all when nothing was counted, are taken from every layer in turn.

    Args:
        capacity: experts that fit.
        counts: activations by phase, layer and expert; what was never chosen may be missing.
    """

    def activations(layer: int, expert: int) -> int:
        return sum(rows.get(layer, {}).get(expert, 0) for rows in counts.values())

    dealt = even_placement(layers, num_experts, num_shelves)[shelf]
    ranked = [
        (-activations(layer, expert), turn, place, ExpertId(layer, expert))
        for place, layer in enumerate(layers)
        for turn, expert in enumerate(dealt[layer])
    ]
    return [expert for *_, expert in sorted(ranked)[:capacity]]


def shelf_room(wanted_bytes: int, store_bytes: int) -> int:
    """Bytes of `wanted_bytes` that a shelf may fill of a node's object store.

    From four fifths on, Ray moves objects to disk, where they are of no use; what is left below that is for whatever
    else comes by.
    """
    return min(wanted_bytes, store_bytes * 7 // 10)


def _fits(needs: Mapping[str, float], has: Mapping[str, float]) -> bool:
    return all(has.get(name, 0.0) >= amount for name, amount in needs.items())
