"""From the placement that is, step by step to a better one: the cheapest changes first, each worth twice its cost.

A step relieves the busiest host of a layer: another host gets one of its experts, as a further replica or instead of
it, or the two hosts exchange experts, or a replica there makes room. Steps of all layers compete for room and bytes.

Shapes: C candidate steps, F demands, P hosts, E experts of a layer.
"""

from __future__ import annotations

import heapq
from dataclasses import dataclass

import numpy as np

from cluster.placement.layers import Layers, smooth_max

_LEAST_GAIN = 1e-4  # of a layer's time; below, it is rounding


@dataclass(frozen=True, slots=True, kw_only=True)
class StepPrice:
    """What a transfer of one expert costs, and how long a better placement is expected to last. Seconds.

    A step is taken if it saves more than twice its transfers' cost within `horizon_s`; see planner.
    """

    transfer_s: float
    horizon_s: float

    def pays(self, gain_s: float, transfers: int) -> bool:
        return gain_s * self.horizon_s > 2.0 * self.transfer_s * transfers


@dataclass(frozen=True, slots=True)
class _Candidates:
    """Steps of one layer that relieve host `busy`, each with arrays (C,).

    `expert` is put on host `to`, and leaves `busy` if `leaves`. `other` (E: none) leaves `to`, and is put on `busy` if
    `comes`: then two experts change places.
    """

    busy: int
    expert: np.ndarray
    to: np.ndarray
    leaves: np.ndarray
    other: np.ndarray
    comes: np.ndarray


@dataclass(frozen=True, slots=True)
class _Step:
    layer: int
    gain_s: float
    transfers: int
    busy: int
    expert: int
    to: int
    leaves: bool
    other: int
    comes: bool


def refine(layers: Layers, price: StepPrice, max_transfers: int) -> int:
    """Change `layers` by the steps that pay, best gain per transfer first; the number of transfers made."""
    num_layers = len(layers.owned_LPE)
    room = layers.room()
    queue: list[tuple[float, int, _Step]] = []

    def offer(layer: int) -> None:
        step = _best_step(layers, layer, room, price, max_transfers - made)
        if step is not None:
            heapq.heappush(queue, (-step.gain_s / step.transfers, layer, step))

    made = 0
    for layer in range(num_layers):
        offer(layer)
    while queue:
        _, layer, step = heapq.heappop(queue)
        if step.transfers <= max_transfers - made and (step.other < layers.owned_LPE.shape[2] or room[step.to] > 0):
            _apply(layers, step)
            made += step.transfers
            room = layers.room()
        offer(layer)
    return made


def _best_step(layers: Layers, layer: int, room_P: np.ndarray, price: StepPrice, transfers_left: int) -> _Step | None:
    times_FP = layers.host_times(layer)
    now_s = float(smooth_max(times_FP))
    best: _Step | None = None
    for busy in sorted(set(times_FP.argmax(axis=1).tolist())):
        found = _candidates(layers, layer, busy, room_P)
        if not len(found.expert):
            continue
        gains = now_s - smooth_max(_times_after(layers, layer, found, times_FP))
        transfers = 1 + found.comes
        gains = np.where(
            (gains * price.horizon_s > 2.0 * price.transfer_s * transfers)
            & (gains > _LEAST_GAIN * now_s)
            & (transfers <= transfers_left),
            gains,
            0.0,
        )
        worth = gains / transfers
        at = int(worth.argmax())
        if worth[at] > 0 and (best is None or worth[at] > best.gain_s / best.transfers):
            best = _Step(
                layer,
                float(gains[at]),
                int(transfers[at]),
                busy,
                int(found.expert[at]),
                int(found.to[at]),
                bool(found.leaves[at]),
                int(found.other[at]),
                bool(found.comes[at]),
            )
    return best


def _candidates(layers: Layers, layer: int, busy: int, room_P: np.ndarray) -> _Candidates:
    """All steps that relieve `busy`, in a fixed order: moves and replicas where there is room, and exchanges."""
    owned_PE = layers.owned_LPE[layer]
    num_hosts, num_experts = owned_PE.shape
    may = (~owned_PE) & owned_PE[busy]  # [to, expert]; never the busy host itself: it owns them
    to, expert = np.nonzero(may & (room_P > 0)[:, None])
    none = np.full(len(to), num_experts)
    no, yes = np.zeros(len(to), dtype=bool), np.ones(len(to), dtype=bool)
    parts = [(expert, to, yes, none, no), (expert, to, no, none, no)]
    is_replica = owned_PE.sum(axis=0) > 1
    for host in range(num_hosts):
        if host == busy:
            continue
        mine = np.flatnonzero(may[host])
        theirs = np.flatnonzero(owned_PE[host] & ~owned_PE[busy])
        spare = np.flatnonzero(owned_PE[host] & is_replica)
        for others, leaves, comes in ((theirs, True, True), (spare, True, False), (spare, False, False)):
            if len(others) == 0 or (not comes and room_P[host] > 0):
                continue
            pairs = len(mine) * len(others)
            parts.append(
                (
                    np.repeat(mine, len(others)),
                    np.full(pairs, host),
                    np.full(pairs, leaves),
                    np.tile(others, len(mine)),
                    np.full(pairs, comes),
                )
            )
    return _Candidates(busy, *(np.concatenate(column) for column in zip(*parts, strict=True)))


def _times_after(layers: Layers, layer: int, steps: _Candidates, times_FP: np.ndarray) -> np.ndarray:
    """Seconds per second of every host after each step, (F, C, P).

    All owners of an expert spend the same time on it, the amount over the sum of their speeds: a change of owners
    changes that for all of them, and then for the one that got or lost it.
    """
    owned = np.column_stack([layers.owned_LPE[layer], np.zeros(len(layers.limit_P), dtype=bool)]).astype(np.float64)
    amount_FE = np.column_stack([layers.amount_FLE[:, layer], np.zeros(len(layers.speed_FP))])
    speeds_FE = layers.speed_FP @ owned
    to_speed, busy_speed = layers.speed_FP[:, steps.to], layers.speed_FP[:, [steps.busy]]
    is_other = steps.other < owned.shape[1] - 1
    first_speeds = speeds_FE[:, steps.expert] + to_speed - steps.leaves * busy_speed
    other_speeds = speeds_FE[:, steps.other] - is_other * to_speed + steps.comes * busy_speed

    def each(amount: np.ndarray, speeds: np.ndarray) -> np.ndarray:
        return np.divide(amount, speeds, out=np.zeros_like(amount), where=speeds > 0)

    times_FE = each(amount_FE, speeds_FE)
    first = each(amount_FE[:, steps.expert], first_speeds)
    other = each(amount_FE[:, steps.other], other_speeds)
    after = times_FP[:, None, :] + (first - times_FE[:, steps.expert])[:, :, None] * owned[:, steps.expert].T[None]
    after += (other - times_FE[:, steps.other])[:, :, None] * owned[:, steps.other].T[None]
    index = np.arange(len(steps.expert))
    after[:, index, steps.to] += first - is_other * other
    after[:, :, steps.busy] += steps.comes * other - steps.leaves * first
    return np.maximum(after, 0.0)


def _apply(layers: Layers, step: _Step) -> None:
    layers.give(step.layer, step.expert, step.to)
    if step.leaves:
        layers.take(step.layer, step.expert, step.busy)
    if step.other < layers.owned_LPE.shape[2]:
        layers.take(step.layer, step.other, step.to)
        if step.comes:
            layers.give(step.layer, step.other, step.busy)
