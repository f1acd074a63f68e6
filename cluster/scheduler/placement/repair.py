"""What has to be mended before anything is weighed: experts that nobody owns, and hosts that own more than they hold.

Shapes: F demands, L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

import numpy as np

from cluster.scheduler.placement.layers import Layers


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
