"""The moves between two placements, each with what it carries, what it saves and why.

Shapes: F demands, L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.cost import Demand
from cluster.placement.inputs import PlacementInputs
from cluster.placement.layers import Layers
from cluster.placement.plan import Move, MoveKind
from cluster.types import ExpertId


@dataclass(frozen=True, slots=True)
class Change:
    """One replica more, fewer or elsewhere. Hosts by place in `inputs.owners`; `source` None: no living owner."""

    kind: MoveKind
    row: int
    expert: int
    source: int | None
    target: int | None


def changes_between(before_LPE: np.ndarray, after_LPE: np.ndarray) -> list[Change]:
    """The least changes, by layer and expert. A host that is rid of an expert gives it to one that gets it."""
    changes: list[Change] = []
    for row, expert in np.argwhere((before_LPE != after_LPE).any(axis=1)).tolist():
        before, after = before_LPE[row, :, expert], after_LPE[row, :, expert]
        got, lost = np.flatnonzero(after & ~before).tolist(), np.flatnonzero(before & ~after).tolist()
        owners = np.flatnonzero(before).tolist()
        for turn, target in enumerate(got):
            if turn < len(lost):
                changes.append(Change(MoveKind.MOVE, row, expert, lost[turn], target))
            else:
                changes.append(
                    Change(MoveKind.ADD, row, expert, owners[turn % len(owners)] if owners else None, target)
                )
        changes += [Change(MoveKind.DROP, row, expert, source, None) for source in lost[len(got) :]]
    return changes


def moves_of(
    inputs: PlacementInputs,
    demands: Sequence[Demand],
    changes: Sequence[Change],
    before: Layers,
    after: Layers,
    stall_s_LE: np.ndarray,
    failover: Mapping[tuple[int, int], float],
) -> list[Move]:
    """Changes in words: repairs first, then by what they save.

    Args:
        before: repaired. stall_s_LE: seconds per second that an expert costs which nobody has. failover: what second
            replicas against the loss of a host save, by (layer's place, expert).
    """
    moves: list[tuple[tuple[bool, float, ExpertId, int, int], Move]] = []
    for change, gain_s in zip(changes, _gains(changes, before, after, stall_s_LE), strict=True):
        layer = inputs.layers[change.row]
        is_repair = change.kind is MoveKind.ADD and change.source is None
        kind, source = change.kind, _index(inputs, change.source)
        if is_repair:
            source = _draining_owner(inputs, layer, change.expert)
            kind = MoveKind.ADD if source is None else MoveKind.MOVE
            reason = _repair_reason(inputs, layer, change.expert, source)
        elif change.kind is MoveKind.ADD and (change.row, change.expert) in failover:
            gain_s = failover[change.row, change.expert]
            stall_s = float(stall_s_LE[change.row, change.expert])
            reason = f"a second replica: if host {source} is lost, {stall_s:.2g} s of reading a second are spared"
        else:
            reason = _reason(inputs, demands, change, before, after)
        move = Move(
            kind=kind,
            expert=ExpertId(layer, change.expert),
            source=source,
            target=_index(inputs, change.target),
            from_tier=None,
            to_tier=None,
            num_bytes=0 if kind is MoveKind.DROP else inputs.expert_bytes,
            gain_s=gain_s,
            reason=reason,
        )
        moves.append(((not is_repair, -gain_s, move.expert, change.source or 0, change.target or 0), move))
    return [move for _, move in sorted(moves, key=lambda entry: entry[0])]


def _gains(changes: Sequence[Change], before: Layers, after: Layers, stall_s_LE: np.ndarray) -> list[float]:
    """What each change saves, seconds per second. A repair: the reading. Others: their part of the layer's whole gain.

    A change's part is by what the layer would lose without it alone; where none counts alone, all count the same.
    """
    gains = [float(stall_s_LE[change.row, change.expert]) if change.source is None else 0.0 for change in changes]
    for row in sorted({change.row for change in changes}):
        places = [at for at, change in enumerate(changes) if change.row == row and change.source is not None]
        now_s = float(after.host_times(row).max(axis=1).sum())
        whole_s = float(before.host_times(row).max(axis=1).sum()) - now_s
        alone = [max(0.0, _without(after, changes[at]) - now_s) for at in places]
        total = sum(alone)
        for at, part in zip(places, alone, strict=True):
            gains[at] = whole_s * (part / total if total > 0 else 1.0 / len(places))
    return gains


def _without(after: Layers, change: Change) -> float:
    """The layer's time if all but this change were made."""
    if change.target is not None:
        after.take(change.row, change.expert, change.target)
    if change.source is not None and change.kind is not MoveKind.ADD:
        after.give(change.row, change.expert, change.source)
    layer_s = float(after.host_times(change.row).max(axis=1).sum())
    if change.target is not None:
        after.give(change.row, change.expert, change.target)
    if change.source is not None and change.kind is not MoveKind.ADD:
        after.take(change.row, change.expert, change.source)
    return layer_s


def _index(inputs: PlacementInputs, place: int | None) -> int | None:
    return None if place is None else inputs.owners[place].index


def _draining_owner(inputs: PlacementInputs, layer: int, expert: int) -> int | None:
    draining = sorted(host.index for host in inputs.hosts if host.is_draining)
    return next((index for index in draining if _owns(inputs, index, layer, expert)), None)


def _repair_reason(inputs: PlacementInputs, layer: int, expert: int, draining: int | None) -> str:
    if draining is not None:
        return f"host {draining} drains and no other owns it"
    known = {host.index for host in inputs.hosts}
    lost = [index for index in sorted(inputs.current.hosts) if index not in known]
    last = next((index for index in lost if _owns(inputs, index, layer, expert)), None)
    return "no host owns it" if last is None else f"host {last} is lost and no other owned it"


def _owns(inputs: PlacementInputs, index: int, layer: int, expert: int) -> bool:
    return expert in inputs.current.hosts.get(index, {}).get(layer, ())


def _reason(inputs: PlacementInputs, demands: Sequence[Demand], change: Change, before: Layers, after: Layers) -> str:
    """By the phase in which the layer's hosts differ most."""
    owners = inputs.owners
    times_FP = before.host_times(change.row)
    relative_FP = times_FP / np.maximum(times_FP.mean(axis=1, keepdims=True), 1e-15)
    phase = int(relative_FP.max(axis=1).argmax())
    relative_P = relative_FP[phase]
    then = after.host_times(change.row)[phase]
    then_P = then / max(float(then.mean()), 1e-15)
    label = f"{demands[phase].phase} ({demands[phase].regime}-bound)" if demands else "load"
    size = after.expert_times(change.row)[phase, change.expert] / max(float(times_FP[phase].mean()), 1e-15)
    if change.kind is MoveKind.DROP:
        assert change.source is not None
        return f"host {owners[change.source].index} needs the room for others; another replica stays"
    assert change.target is not None
    source = change.source if change.kind is MoveKind.MOVE else _busiest(before, change, relative_P)
    assert source is not None
    first, second = (f"host {owners[place].index}" for place in (source, change.target))
    result = f"then {then_P[source]:.2f}x and {then_P[change.target]:.2f}x"
    if relative_P[source] < relative_P[change.target]:
        told = f"{first} ({relative_P[source]:.2f}x) makes room for what {second} ({relative_P[change.target]:.2f}x)"
        return f"{told} gives; {result}"
    told = f"{first} is at {relative_P[source]:.2f}x the mean of {label}: {size:.2f} of it"
    goes = "goes to" if change.kind is MoveKind.MOVE else "is shared by a further replica on"
    return f"{told} {goes} {second} ({relative_P[change.target]:.2f}x); {result}"


def _busiest(before: Layers, change: Change, relative_P: np.ndarray) -> int:
    owning = np.flatnonzero(before.owned_LPE[change.row, :, change.expert])
    return int(owning[relative_P[owning].argmax()])
