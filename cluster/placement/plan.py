"""Where experts are to be, and the moves that lead there. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum

from cluster.placement.snapshot import Snapshot
from cluster.types import ExpertId, Tier


@dataclass(frozen=True, slots=True, kw_only=True)
class Placement:
    """Experts by layer that each host owns, by host index. An expert may have replicas on several hosts.

    Epochs only grow. Correctness never depends on a placement: any host computes any expert, more slowly.
    """

    epoch: int
    hosts: Mapping[int, Mapping[int, tuple[int, ...]]]


class MoveKind(StrEnum):
    """What a move does to an expert's replicas."""

    ADD = "add"  # one more replica
    MOVE = "move"  # another host has it then
    DROP = "drop"  # one replica fewer
    PROMOTE = "promote"  # to a faster tier of the same host
    DEMOTE = "demote"  # to a slower one


@dataclass(frozen=True, slots=True, kw_only=True)
class Move:
    """One change. `gain_s`: seconds of a busiest host's time saved per second served. `reason` is for people."""

    kind: MoveKind
    expert: ExpertId
    source: int | None
    target: int | None
    from_tier: Tier | None
    to_tier: Tier | None
    num_bytes: int
    gain_s: float
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementPlan:
    """A placement to go to, or why to stay. `applies` False: `reason` says what was not worth it.

    balance_now, balance_then: largest over mean load of hosts, each layer weighed by its load. gain_s, cost_s: over the
    horizon planned for. snapshot: what it was made of, where that has a name.
    """

    placement: Placement
    moves: tuple[Move, ...]
    applies: bool
    reason: str
    balance_now: float
    balance_then: float
    gain_s: float
    cost_s: float
    snapshot: Snapshot | None = None

    @property
    def num_bytes(self) -> int:
        """Bytes that all moves carry."""
        return sum(move.num_bytes for move in self.moves)
