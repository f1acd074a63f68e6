"""Which memory tier each expert of one host lies in: most saved stall per byte first, and no swap for a trifle.

Groundwork: plans that also say which experts to bring into a faster tier of their host. Missing: hosts report where
each expert lies (`PlacementInputs.tiers` is empty live), and nobody carries out a PROMOTE or a DEMOTE.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.cost import PlacementHost, touch_rates
from cluster.placement.inputs import PlacementInputs
from cluster.placement.plan import Move, MoveKind
from cluster.types import ExpertId, Tier

_ORDER = (Tier.DEVICE, Tier.RAM, Tier.REMOTE, Tier.DISK)


@dataclass(frozen=True, slots=True, eq=False)
class TierPlan:
    """tier: index into `tiers` of every expert. saved_s: stall saved per second by each change, 0 where none."""

    tiers: tuple[Tier, ...]
    tier: np.ndarray
    saved_s: np.ndarray


def choose_tiers(
    touches: Sequence[float] | np.ndarray,
    num_bytes: Sequence[int] | np.ndarray,
    budgets: Mapping[Tier, int],
    miss_s: Mapping[Tier, float],
    now: Sequence[Tier],
    *,
    hysteresis: float = 0.2,
) -> TierPlan:
    """Fill the tiers from the fastest, with the experts whose stall per byte is largest.

    The stall of an expert in a tier is its touches per second times what one costs from there. With experts of one size
    that is the least total stall; with several sizes it is the greedy bound of the knapsack. An expert keeps its tier
    unless one that is worth `hysteresis` more wants its place: counts waver, and every swap costs a transfer.

    Args:
        touches: uses per second of each expert; miss_s: seconds of one use, by tier, not rising with speed.
        budgets: bytes by tier; one that is missing has none, DISK holds everything.
        now: the tier of each expert.
    """
    touched, size = np.asarray(touches, dtype=np.float64), np.asarray(num_bytes, dtype=np.int64)
    worth = touched / np.maximum(size, 1)
    place = np.array([_ORDER.index(tier) for tier in now], dtype=np.int64)
    result = np.full(len(touched), len(_ORDER) - 1, dtype=np.int64)
    open_ = np.ones(len(touched), dtype=bool)
    for rank, tier in enumerate(_ORDER[:-1]):
        left = budgets.get(tier, 0)
        # What lies here or above counts for more: it would have to be pushed out.
        bonus = np.where(place <= rank, 1.0 + hysteresis, 1.0)
        for expert in np.lexsort((np.arange(len(worth)), place, -worth * bonus)).tolist():
            if open_[expert] and size[expert] <= left and (touched[expert] > 0 or place[expert] <= rank):
                result[expert], open_[expert] = rank, False
                left -= int(size[expert])
    cost = np.array([miss_s.get(tier, 0.0) for tier in _ORDER])
    return TierPlan(_ORDER, result, touched * (cost[place] - cost[result]))


def tier_moves(inputs: PlacementInputs, owned_LPE: np.ndarray) -> list[Move]:
    """Experts that hosts should have in a faster tier, with those that make room, for hosts that say what they hold.

    An expert is fetched only if the stall saved within the horizon is more than twice what fetching costs.
    """
    touches_LE = touch_rates(inputs.loads, inputs.top_k, len(inputs.layers), inputs.num_experts)
    each_LE = touches_LE / np.maximum(owned_LPE.sum(axis=1), 1)  # of a replica
    moves: list[Move] = []
    for place, host in enumerate(inputs.owners):
        now = inputs.tiers.get(host.index)
        if now is None or not host.miss_s:
            continue
        held: list[list[int]] = np.argwhere(owned_LPE[:, place]).tolist()
        ids = [ExpertId(inputs.layers[row], expert) for row, expert in held]
        touches = [float(each_LE[row, expert]) for row, expert in held]
        budgets = {
            Tier.DEVICE: host.capacity * inputs.expert_bytes,
            Tier.RAM: host.ram_capacity * inputs.expert_bytes,
        }
        held_at = [now.get(each, Tier.DISK) for each in ids]
        plan = choose_tiers(touches, [inputs.expert_bytes] * len(ids), budgets, host.miss_s, held_at)
        order: list[int] = np.argsort(-plan.saved_s, kind="stable").tolist()
        for at in order:
            move = _tier_move(inputs, host, ids[at], touches[at], held_at[at], plan, at)
            if move is not None:
                moves.append(move)
    return moves


def _tier_move(
    inputs: PlacementInputs, host: PlacementHost, expert: ExpertId, touches: float, now: Tier, plan: TierPlan, at: int
) -> Move | None:
    """None: it stays, or fetching it does not pay."""
    then, saved_s = plan.tiers[int(plan.tier[at])], float(plan.saved_s[at])
    is_faster = _ORDER.index(then) < _ORDER.index(now)
    fetch_s = host.miss_s.get(now, 0.0)
    if then is now or (is_faster and saved_s * inputs.horizon_s <= 2.0 * fetch_s):
        return None
    reason = f"asked for {touches:.3g} times a second, "
    reason += f"{1e3 * fetch_s:.3g} ms each from {now}" if is_faster else "less than those that take its room"
    return Move(
        kind=MoveKind.PROMOTE if is_faster else MoveKind.DEMOTE,
        expert=expert,
        source=host.index,
        target=host.index,
        from_tier=now,
        to_tier=then,
        num_bytes=inputs.expert_bytes if is_faster else 0,
        gain_s=saved_s,
        reason=reason,
    )
