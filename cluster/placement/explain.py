"""A plan as plain values and as lines, for people and for `--json`. The same for a live plan and for one of a trace."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from cluster.placement.plan import Move, MoveKind, PlacementPlan

COLUMNS = ("move", "layer", "expert", "from", "to", "bytes", "saves", "reason")


def plan_as_dict(plan: PlacementPlan) -> dict[str, Any]:
    """JSON's types only. `hosts` is the placement to go to: experts by host and layer."""
    return {
        "applies": plan.applies,
        "reason": plan.reason,
        "epoch": plan.placement.epoch,
        "balance_now": plan.balance_now,
        "balance_then": plan.balance_then,
        "gain_s": plan.gain_s,
        "cost_s": plan.cost_s,
        "bytes": plan.num_bytes,
        "snapshot": None if plan.snapshot is None else asdict(plan.snapshot),
        "moves": [_move_as_dict(move) for move in plan.moves],
        "hosts": {
            str(host): {str(layer): list(experts) for layer, experts in layers.items()}
            for host, layers in plan.placement.hosts.items()
        },
    }


def plan_headline(plan: Mapping[str, Any]) -> list[str]:
    """What there is to know before the table of moves."""
    told = [("would apply: " if plan["applies"] else "stays: ") + str(plan["reason"])]
    if plan.get("snapshot") is not None:
        told.append(snapshot_text(plan["snapshot"]))
    if not plan["moves"]:
        return told
    kinds = Counter(str(move["kind"]) for move in plan["moves"])
    told.append(
        f"{', '.join(f'{count} {kind}' for kind, count in sorted(kinds.items()))}; {_size(plan['bytes'])} carried; "
        f"saves {plan['gain_s']:.3g} s within the horizon for {plan['cost_s']:.3g} s of carrying"
    )
    told.append(f"largest over mean host load: {plan['balance_now']:.3f} now, {plan['balance_then']:.3f} then")
    return told


def snapshot_text(snapshot: Mapping[str, Any]) -> str:
    """Which moment a page is of: those of one snapshot agree in every number."""
    return (
        f"snapshot {snapshot['number']}: scheduler up {snapshot['uptime_s']:.1f} s, placement epoch {snapshot['epoch']}"
    )


def plan_rows(plan: Mapping[str, Any]) -> list[tuple[str, ...]]:
    """One row of COLUMNS for each move."""
    return [
        (
            str(move["kind"]),
            str(move["layer"]),
            str(move["expert"]),
            _place(move["source"], move["from_tier"]),
            _place(move["target"], move["to_tier"]),
            _size(move["bytes"]),
            f"{1e3 * move['gain_s']:.3g} ms/s",
            str(move["reason"]),
        )
        for move in plan["moves"]
    ]


def _move_as_dict(move: Move) -> dict[str, Any]:
    return {
        "kind": str(MoveKind(move.kind)),
        "layer": move.expert.layer,
        "expert": move.expert.expert,
        "source": move.source,
        "target": move.target,
        "from_tier": None if move.from_tier is None else str(move.from_tier),
        "to_tier": None if move.to_tier is None else str(move.to_tier),
        "bytes": move.num_bytes,
        "gain_s": move.gain_s,
        "reason": move.reason,
    }


def _place(host: int | None, tier: str | None) -> str:
    if host is None:
        return "-"
    return f"host {host}" if tier is None else f"host {host}, {tier}"


def _size(num_bytes: int) -> str:
    for unit, name in ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")):
        if num_bytes >= unit:
            return f"{num_bytes / unit:.4g} {name}"
    return f"{num_bytes} B"
