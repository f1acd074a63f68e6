"""What has to be mended before anything is weighed: experts that nobody owns, hosts that come (back) with nothing, and
hosts that own more than they hold.

Shapes: F demands, L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

import numpy as np

from cluster.placement.layers import Layers


def adopt_orphans(layers: Layers) -> int:
    """Give every expert without an owner to the host that is least busy with its layer then; how many there were.

    The heaviest go first. Hosts with room come before hosts without; where none has any, a host owns more than it holds
    and reads the rest when it is asked for, which is slow and right.
    """
    orphans = [(int(row), int(expert)) for row, expert in np.argwhere(~layers.owned_LPE.any(axis=1))]
    weight = {(row, expert): float(layers.amount_FLE[:, row, expert].sum()) for row, expert in orphans}
    room = layers.room()
    for row, expert in sorted(orphans, key=lambda orphan: (-weight[orphan], orphan)):
        alone_FP = layers.amount_FLE[:, row, expert, None] / layers.speed_FP
        after_FP = layers.host_times(row) + alone_FP
        busy_P = (after_FP / np.maximum(after_FP.mean(axis=1, keepdims=True), 1e-15)).sum(axis=0)
        host = min(range(len(room)), key=lambda p: (room[p] <= 0, busy_P[p] if room[p] > 0 else -room[p], p))
        layers.give(row, expert, host)
        room[host] -= 1
    return len(orphans)


def fill_newcomers(layers: Layers, is_new_P: np.ndarray) -> int:
    """Give hosts their share of every layer, by room; how many experts change hosts.

    Such a host joined, or is used again after it was emptied: to wait until its share pays means to wait for load that
    the others take meanwhile. Those who own most for their room give, and of each layer what comes nearest to the
    newcomer's share of its load.
    """
    num_layers, _, num_experts = layers.owned_LPE.shape
    if is_new_P.all():
        return 0
    share_P = layers.limit_P / max(int(layers.limit_P.sum()), 1)
    made = 0
    for host in np.flatnonzero(is_new_P).tolist():
        wanted = int(share_P[host] * num_layers * num_experts)
        for row in range(num_layers):
            quota = (row + 1) * wanted // num_layers - row * wanted // num_layers
            made += _take_share(layers, row, host, quota - int(layers.owned_LPE[row, host].sum()), share_P)
    return made


def lacks_its_share(layers: Layers) -> np.ndarray:
    """Which hosts own less than half of what their room calls for, (P,) bool."""
    num_layers, _, num_experts = layers.owned_LPE.shape
    share_P = layers.limit_P * (num_layers * num_experts / max(int(layers.limit_P.sum()), 1))
    return layers.owned_LPE.sum(axis=(0, 2)) < share_P / 2


def _take_share(layers: Layers, row: int, host: int, quota: int, share_P: np.ndarray) -> int:
    """Let a host take so many experts of a layer from the others; how many it got."""
    weight_E = (layers.amount_FLE[:, row] / layers.speed_FP.sum(axis=1, keepdims=True)).sum(axis=0)
    left = float(weight_E.sum() * share_P[host])
    made = 0
    while made < quota:
        owned_PE = layers.owned_LPE[row]
        surplus_P = layers.owned_LPE.sum(axis=(0, 2)) - share_P * layers.owned_LPE.shape[0] * layers.owned_LPE.shape[2]
        may_give = owned_PE.any(axis=1)
        may_give[host] = False
        candidates_PE = owned_PE & ~owned_PE[host] & may_give[:, None]
        if not candidates_PE.any():
            break
        donor = int(np.where(candidates_PE.any(axis=1), surplus_P, -np.inf).argmax())
        if surplus_P[donor] <= 0:
            break
        theirs = np.flatnonzero(candidates_PE[donor])
        expert = int(theirs[np.abs(weight_E[theirs] - left / (quota - made)).argmin()])
        layers.give(row, expert, host)
        layers.take(row, expert, donor)
        left -= float(weight_E[expert])
        made += 1
    return made


def relieve_full(layers: Layers, stall_s_LPE: np.ndarray, least_s: float, max_transfers: int) -> int:
    """Move the coldest experts of hosts that own more than they hold to hosts with room; the number of transfers.

    What does not fit is read again whenever it is used. A replica that another host has too is given up for nothing.

    Args:
        stall_s_LPE: seconds per second that the expert's reading takes if it is not in that host's memory.
        least_s: what a move must save, in seconds per second.
    """
    made = 0
    for host in np.flatnonzero(layers.room() < 0).tolist():
        excess = -int(layers.room()[host])
        held = [
            (float(stall_s_LPE[row, host, e]), int(row), int(e)) for row, e in np.argwhere(layers.owned_LPE[:, host])
        ]
        for stall_s, row, expert in sorted(held):
            if excess == 0:
                break
            if layers.owned_LPE[row, :, expert].sum() == 1:
                room = np.where(layers.owned_LPE[row, :, expert], 0, layers.room())
                if room.max() <= 0 or stall_s <= least_s or made >= max_transfers:
                    continue
                layers.give(row, expert, int(room.argmax()))
                made += 1
            layers.take(row, expert, host)
            excess -= 1
    return made
