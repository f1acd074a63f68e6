"""A placement from nothing but loads: DeepSeek's EPLB for hosts of different speed and memory, without duplicates.

Replicate, pack, then name the result after what is there already, so that little has to move. EPLB's replication is
optimal for the largest load of one replica; its packing is Graham's longest-first rule under a number of slots.

Shapes: F demands, L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

import heapq
from collections.abc import Sequence

import numpy as np

from cluster.placement.assignment import best_assignment
from cluster.placement.layers import Layers
from cluster.placement.refine import StepPrice, refine

_WORTHLESS = 1e-12


def rebuild(layers: Layers) -> None:
    """Place everything anew within the hosts' limits, as near to the present placement as balance allows."""
    present = layers.owned_LPE.copy()
    num_layers, num_hosts, num_experts = present.shape
    weight_LE = _weights(layers)
    slots = min(int(layers.limit_P.sum()), num_layers * num_experts * num_hosts)
    copies_LE = replicate(weight_LE, slots, num_hosts)
    quota_LP = deal_slots(layers.limit_P, copies_LE.sum(axis=1), num_experts)
    for layer in range(num_layers):
        packed = pack(layers, layer, copies_LE[layer], quota_LP[layer], present[layer])
        layers.owned_LPE[layer] = packed[_relabelled(layers, quota_LP[layer], packed, present[layer])]
    refine(layers, StepPrice(transfer_s=0.0, horizon_s=1.0), max_transfers=slots)


def replicate(weight_LE: np.ndarray, slots: int, num_hosts: int) -> np.ndarray:
    """Replicas of every expert, (L, E) int: one each, then one more for the largest load of a replica, ties by id.

    All layers share the slots: each passes on the same number of tokens, so their loads compare. No expert gets more
    replicas than there are hosts, and one without load gets no second.

    Args:
        slots: places for replicas, at least L * E.
    """
    num_layers, num_experts = weight_LE.shape
    copies = np.ones((num_layers, num_experts), dtype=np.int64)
    queue = [
        (-weight, layer, expert)
        for layer, row in enumerate(weight_LE.tolist())
        for expert, weight in enumerate(row)
        if weight > _WORTHLESS and num_hosts > 1
    ]
    heapq.heapify(queue)
    for _ in range(slots - copies.size):
        if not queue:
            break
        _, layer, expert = heapq.heappop(queue)
        copies[layer, expert] += 1
        count = int(copies[layer, expert])
        if count < num_hosts:
            heapq.heappush(queue, (-weight_LE[layer, expert] / count, layer, expert))
    return copies


def deal_slots(
    limit_P: Sequence[int] | np.ndarray, wanted_L: Sequence[int] | np.ndarray, num_experts: int
) -> np.ndarray:
    """How many experts each host takes of each layer, (L, P) int: by its memory, a layer's sum as wanted.

    The host that lags most behind its share of all slots so far takes the next one, ties by index; none takes an
    expert twice, and sums of hosts stay within `limit_P`. Where only one host has room left, a layer may get fewer
    than wanted, but always `num_experts`: sum(limit_P) must be at least sum(wanted_L), and that at least L * E.
    """
    limit = np.asarray(limit_P, dtype=np.int64)
    share = limit / max(int(limit.sum()), 1)
    given = np.zeros((len(wanted_L), len(limit)), dtype=np.int64)
    taken = np.zeros(len(limit), dtype=np.int64)
    due = 0
    for layer, wanted in enumerate(wanted_L):
        due += int(wanted)
        for _ in range(int(wanted)):
            lag = np.where((taken < limit) & (given[layer] < num_experts), share * due - taken, -np.inf)
            host = int(lag.argmax())
            if not np.isfinite(lag[host]):
                break
            given[layer, host] += 1
            taken[host] += 1
    return given


def pack(layers: Layers, layer: int, copies_E: np.ndarray, quota_P: np.ndarray, present_PE: np.ndarray) -> np.ndarray:
    """Owners of one layer's experts, (P, E) bool: heaviest replica first, to the host that is least busy with it then.

    No expert twice on a host; a further replica that finds only hosts which have its expert is left out. (A first one
    always finds room: as many replicas are left as places.) Of equally busy hosts one that owns the expert already is
    taken, else the first.
    """
    share_FE = layers.amount_FLE[:, layer] / copies_E
    level_F = np.maximum((share_FE * copies_E).sum(axis=1) / layers.speed_FP.sum(axis=1), _WORTHLESS)
    size_FEP = share_FE[:, :, None] / layers.speed_FP[:, None, :] / level_F[:, None, None]
    weight_E = size_FEP.mean(axis=(0, 2)).tolist()
    replicas = [expert for expert, copies in enumerate(copies_E.tolist()) for _ in range(copies)]
    busy_FP = np.zeros(layers.speed_FP.shape)
    owned = np.zeros(present_PE.shape, dtype=bool)
    room = quota_P.copy()
    for expert in sorted(replicas, key=lambda e: (-weight_E[e], e)):
        after = ((busy_FP + size_FEP[:, expert]) ** 4).sum(axis=0)  # near the larger of the phases; order of one alone
        after[(room <= 0) | owned[:, expert]] = np.inf
        least = after.min()
        if not np.isfinite(least):
            continue
        near = np.flatnonzero(after <= least * (1.0 + 1e-9))
        host = int(next((p for p in near if present_PE[p, expert]), near[0]))
        owned[host, expert] = True
        room[host] -= 1
        busy_FP[:, host] += size_FEP[:, expert, host]
    return owned


def _weights(layers: Layers) -> np.ndarray:
    """One number for each expert, (L, E): its mean host time over all phases."""
    return np.einsum("fle,f->le", layers.amount_FLE, (1.0 / layers.speed_FP).mean(axis=1))


def _relabelled(layers: Layers, quota_P: np.ndarray, packed_PE: np.ndarray, present_PE: np.ndarray) -> np.ndarray:
    """Which packed set each host gets, so that most experts stay: only hosts of equal speed and quota swap sets."""
    alike = (layers.speed_FP[:, :, None] == layers.speed_FP[:, None, :]).all(axis=0)
    alike &= quota_P[:, None] == quota_P[None, :]
    stays = present_PE.astype(np.float64) @ packed_PE.T.astype(np.float64)
    return best_assignment(np.where(alike, stays, -np.inf))
