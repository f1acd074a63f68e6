"""The plan: mend what is broken, then move what pays. Pure; the same for a live cluster and for a recorded trace.

Two ways are tried and the one that nets more is taken: from the present placement step by step (refine.py), which moves
little, and anew from the loads (rebuild.py), which is level. A change must save more than twice what it costs.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from cluster.placement.cost import Demand, balance, busiest_s, demands_of, reading_s, touch_rates
from cluster.placement.free_capacity import add_failover_replicas, gather_pairs
from cluster.placement.inputs import PlacementInputs, own_limits, owned_array, placement_of
from cluster.placement.layers import Layers
from cluster.placement.moves import changes_between, moves_of
from cluster.placement.plan import PlacementPlan
from cluster.placement.rebuild import rebuild
from cluster.placement.refine import StepPrice, refine
from cluster.placement.repair import adopt_orphans, fill_newcomers, lacks_its_share, relieve_full
from cluster.placement.tiering import tier_moves


def present_owners(inputs: PlacementInputs, demands: list[Demand]) -> np.ndarray:
    """Who owns what, (L, P, E) bool, experts of lost hosts with those that would take them in."""
    shape = (len(inputs.layers), inputs.num_experts)
    limits = own_limits([host.capacity for host in inputs.owners], *shape)
    present = Layers.of(owned_array(inputs), limits, demands)
    adopt_orphans(present)
    return present.owned_LPE


def present_balance(inputs: PlacementInputs) -> float | None:
    """Largest over mean load of the hosts now, as `plan_placement` says it; None where none can own experts."""
    if not inputs.owners:
        return None
    demands = demands_of(inputs.loads, inputs.owners, inputs.top_k)
    return balance(demands, present_owners(inputs, demands))


def plan_placement(inputs: PlacementInputs) -> PlacementPlan:
    """The placement to go to, or why to stay (`applies` False, the present placement, its `reason`).

    Repairs (an expert without a living owner, a host that comes with nothing) are made whatever they cost; all else
    within `max_bytes` less these, and only if it saves more than twice its cost within the horizon.

    Host 0 owns the two experts that are used most, so they exchange one:

    >>> from cluster.placement.cost import PhaseLoad, PlacementHost
    >>> from cluster.placement.plan import Placement
    >>> hosts = tuple(PlacementHost(index=index, capacity=2, expert_s=1e-3) for index in (0, 1))
    >>> now = Placement(epoch=1, hosts={0: {0: (0, 1)}, 1: {0: (2, 3)}})
    >>> loads = {"decode": PhaseLoad(expected_LE=np.array([[6.0, 5.0, 1.0, 2.0]]), tokens_per_s=100.0)}
    >>> plan = plan_placement(PlacementInputs(
    ...     layers=(0,), num_experts=4, top_k=1, expert_bytes=1, hosts=hosts, current=now, loads=loads))
    >>> plan.placement.hosts, plan.reason
    ({0: {0: (1, 3)}, 1: {0: (0, 2)}}, '2 changes level the hosts: largest over mean load 1.571 -> 1.000')
    """
    owners = inputs.owners
    if not owners:
        return _staying(inputs, "no host can own experts: all are lost or draining", 1.0)
    demands = demands_of(inputs.loads, owners, inputs.top_k)
    shape = (len(inputs.layers), inputs.num_experts)
    limits = own_limits([host.capacity for host in owners], *shape)
    present = Layers.of(owned_array(inputs), limits, demands)
    stall_s_LPE = touch_rates(inputs.loads, inputs.top_k, *shape)[:, None, :] * np.array(
        [reading_s(host) for host in owners]
    ).reshape(1, -1, 1)

    mended = present.copy()
    num_orphans = adopt_orphans(mended)
    balance_now = balance(demands, mended.owned_LPE)
    comes_P = np.array([host.comes for host in owners])
    num_filled = fill_newcomers(mended, comes_P & lacks_its_share(mended))
    budget = _transfers_allowed(inputs, num_orphans + num_filled)
    least_s = 2.0 * inputs.transfer_s / inputs.horizon_s
    relieved = mended.copy()
    budget -= relieve_full(relieved, stall_s_LPE, least_s, budget)
    relief_s = _overflow_s(mended, stall_s_LPE) - _overflow_s(relieved, stall_s_LPE)
    is_uneven = balance(demands, mended.owned_LPE) >= inputs.balance_threshold
    better = _levelled(inputs, relieved, demands, budget) if is_uneven else relieved.copy()
    gathered_s = gather_pairs(inputs, demands, better, least_s, budget - _transfers(relieved, better))
    failover = add_failover_replicas(inputs, better, stall_s_LPE, least_s, budget - _transfers(relieved, better))

    gain_s = busiest_s(demands, relieved.owned_LPE) - busiest_s(demands, better.owned_LPE)
    gain_s = (gain_s + relief_s + gathered_s + sum(failover.values())) * inputs.horizon_s
    cost_s = _transfers(mended, better) * inputs.transfer_s
    if gain_s <= 2.0 * cost_s or not (better.owned_LPE != mended.owned_LPE).any():
        better, gain_s, cost_s, failover = mended, 0.0, 0.0, dict[tuple[int, int], float]()
    changes = changes_between(present.owned_LPE, better.owned_LPE)
    moves = moves_of(inputs, demands, changes, mended, better, stall_s_LPE.max(axis=1), failover)
    moves += tier_moves(inputs, better.owned_LPE)
    if not moves:
        return _staying(inputs, _why_stay(inputs, demands, balance_now), balance_now)
    epoch = inputs.current.epoch + (1 if changes else 0)
    return PlacementPlan(
        placement=placement_of(inputs, better.owned_LPE, epoch) if changes else inputs.current,
        moves=tuple(moves),
        applies=True,
        reason=_why_go(
            (num_orphans, num_filled), len(changes), len(moves), balance_now, balance(demands, better.owned_LPE)
        ),
        balance_now=balance_now,
        balance_then=balance(demands, better.owned_LPE),
        gain_s=gain_s + sum(move.gain_s for move in moves if move.to_tier is not None) * inputs.horizon_s,
        cost_s=_transfers(present, better) * inputs.transfer_s,
    )


def _levelled(inputs: PlacementInputs, start: Layers, demands: list[Demand], budget: int) -> Layers:
    """The best of what was found; the start itself if nothing nets anything."""
    best, best_net_s = start.copy(), 0.0
    start_s = busiest_s(demands, start.owned_LPE)
    hosts, experts_LE = start.canonical_order()
    back = hosts.argsort(), experts_LE.argsort(axis=1)
    for search in _found(inputs, start.ordered(hosts, experts_LE), budget):
        found = search.ordered(*back)
        transfers = _transfers(start, found)
        gain_s = (start_s - busiest_s(demands, found.owned_LPE)) * inputs.horizon_s
        net_s = gain_s - 2.0 * transfers * inputs.transfer_s
        if transfers <= budget and net_s > best_net_s * (1.0 + 1e-9):
            best, best_net_s = found.within(start.limit_P), net_s
    return best


def _found(inputs: PlacementInputs, start: Layers, budget: int) -> Iterator[Layers]:
    """Step by step and anew; also without the hosts that own nothing yet: a newcomer never makes a plan worse."""
    price = StepPrice(transfer_s=inputs.transfer_s, horizon_s=inputs.horizon_s)
    is_new = ~start.owned_LPE.any(axis=(0, 2))
    for limit_P in (start.limit_P, np.where(is_new, 0, start.limit_P)):
        if limit_P.sum() >= start.owned_LPE.shape[0] * start.owned_LPE.shape[2]:
            stepwise = start.within(limit_P)
            refine(stepwise, price, budget)
            yield stepwise
            anew = start.within(limit_P)
            rebuild(anew)
            yield anew
        if not is_new.any():
            return


def _transfers_allowed(inputs: PlacementInputs, num_orphans: int) -> int:
    if inputs.max_bytes is None:
        return len(inputs.layers) * inputs.num_experts * len(inputs.owners)
    return max(0, inputs.max_bytes // max(inputs.expert_bytes, 1) - num_orphans)


def _transfers(before: Layers, after: Layers) -> int:
    """Experts that some host gets."""
    return int((after.owned_LPE & ~before.owned_LPE).sum())


def _overflow_s(layers: Layers, stall_s_LPE: np.ndarray) -> float:
    """Seconds per second of reading what hosts own beyond their memory, if that is their least used experts."""
    total = 0.0
    for host in np.flatnonzero(layers.room() < 0).tolist():
        stalls = np.sort(stall_s_LPE[:, host][layers.owned_LPE[:, host]])
        total += float(stalls[: -int(layers.room()[host])].sum())
    return total


def _why_go(mended: tuple[int, int], num_changes: int, num_moves: int, now: float, then: float) -> str:
    num_orphans, num_filled = mended
    told = [f"{num_orphans} experts have no living owner"] if num_orphans else []
    if num_filled:
        told.append(f"{num_filled} experts go to hosts that come (back)")
    rest = num_changes - num_orphans - num_filled
    if rest > 0:
        told.append(f"{rest} changes level the hosts: largest over mean load {now:.3f} -> {then:.3f}")
    if num_moves > num_changes:
        told.append(f"{num_moves - num_changes} experts change their tier")
    return "; ".join(told)


def _why_stay(inputs: PlacementInputs, demands: list[Demand], now: float) -> str:
    if not any(load.tokens_per_s > 0 and load.expected_LE.any() for load in inputs.loads.values()):
        return "nothing was asked of the experts yet"
    if not demands:
        return "the hosts have not measured yet how long experts take, so no gain can be weighed"
    if now < inputs.balance_threshold:
        return f"the hosts are level: largest over mean load {now:.3f}, below {inputs.balance_threshold:g}"
    transfer_s, horizon_s = inputs.transfer_s, inputs.horizon_s
    told = f"largest over mean load is {now:.3f}, but no change saves twice the {transfer_s:.3g} s that an expert costs"
    if inputs.max_bytes is not None and inputs.max_bytes < inputs.expert_bytes:
        return f"{told}: {inputs.max_bytes} bytes may be moved now, an expert has {inputs.expert_bytes}"
    return f"{told} within {horizon_s:g} s"


def _staying(inputs: PlacementInputs, reason: str, now: float) -> PlacementPlan:
    return PlacementPlan(
        placement=inputs.current,
        moves=(),
        applies=False,
        reason=reason,
        balance_now=now,
        balance_then=now,
        gain_s=0.0,
        cost_s=0.0,
    )
