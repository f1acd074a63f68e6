"""What else room and bytes are good for: replicas against the loss of a host, and companions on one host.

Shapes: L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from cluster.placement.cost import Demand, Regime, chances, rows_to_hosts
from cluster.placement.inputs import PlacementInputs
from cluster.placement.layers import Layers, smooth_max

_BALANCE_GIVEN = 1.05  # how much busier gathering companions may make a layer's busiest host


def add_failover_replicas(
    inputs: PlacementInputs, layers: Layers, stall_s_LPE: np.ndarray, least_s: float, max_transfers: int
) -> dict[tuple[int, int], float]:
    """Second replicas for the experts whose loss would stall most; what each (layer's place, expert) saves, s per s.

    A host is lost once in `failure_interval_s`; then its only copies are read for `recovery_s` wherever they are asked
    for. The replica goes to another node where there is one, to the host with most room; if it makes the layer's
    busiest host busier, that is taken off.
    """
    owners = inputs.owners
    value_LE = stall_s_LPE.max(axis=1) * inputs.recovery_s / inputs.failure_interval_s
    single = layers.owned_LPE.sum(axis=1) == 1
    wanted = [(-float(value_LE[row, e]), int(row), int(e)) for row, e in np.argwhere(single & (value_LE > least_s))]
    made: dict[tuple[int, int], float] = {}
    for value, row, expert in sorted(wanted):
        room = layers.room()
        if max_transfers <= 0 or room.max() <= 0:
            break
        owner = int(layers.owned_LPE[row, :, expert].argmax())
        node = owners[owner].node_id
        before_s = float(smooth_max(layers.host_times(row)))
        for host in sorted(range(len(owners)), key=lambda p: (owners[p].node_id == node, -room[p], p)):
            if host == owner or room[host] <= 0:
                continue
            layers.give(row, expert, host)
            harm_s = max(0.0, float(smooth_max(layers.host_times(row))) - before_s)
            if -value - harm_s > least_s:
                made[row, expert], max_transfers = -value, max_transfers - 1
                break
            layers.take(row, expert, host)
    return made


def gather_pairs(
    inputs: PlacementInputs, demands: Sequence[Demand], layers: Layers, least_s: float, max_transfers: int
) -> float:
    """Where the network binds, exchange experts so that those used together share a host; seconds saved per second.

    A token goes once to each host that has one of its experts (as ExFlow and MoETuner place for, within the layer: rows
    come back to the attention worker between layers). Balance may suffer by 5%.

    Groundwork: placement where the network binds. Missing: the statistics count no pairs of experts
    (`PlacementInputs.pairs` is None live).
    """
    saved_s = 0.0
    if inputs.pairs is None:
        return saved_s
    for demand in demands:
        if demand.regime is not Regime.NETWORK:
            continue
        load = inputs.loads[demand.phase]
        chance_LE = chances(load, inputs.top_k)
        second_s = load.tokens_per_s * demand.unit_s_P  # of a layer, if every token goes to the host
        for row in range(len(layers.owned_LPE)):
            limit = float(smooth_max(layers.host_times(row))) * _BALANCE_GIVEN
            while max_transfers >= 2:
                gain_s = _gather_once(layers, row, chance_LE[row], inputs.pairs[row], second_s, limit, 2 * least_s)
                if gain_s <= 0.0:
                    break
                saved_s, max_transfers = saved_s + gain_s, max_transfers - 2
    return saved_s


def _gather_once(
    layers: Layers,
    row: int,
    chance_E: np.ndarray,
    pairs_EE: np.ndarray,
    second_s_P: np.ndarray,
    limit_s: float,
    least_s: float,
) -> float:
    """Make the exchange that joins most companions, if it saves more than `least_s`; what it saves."""
    owned_PE = layers.owned_LPE[row]
    sole = owned_PE.sum(axis=0) == 1
    off = np.where(np.eye(len(chance_E), dtype=bool), 0.0, pairs_EE)
    with_host = off @ owned_PE.T  # [e, p]: how often e's companions are on p
    home = owned_PE.argmax(axis=0)
    gain = with_host[:, home] - with_host[np.arange(len(home)), home][:, None]  # e goes to the home of f
    joined = gain + gain.T - 2.0 * off
    joined[~sole, :], joined[:, ~sole] = -np.inf, -np.inf
    joined[home[:, None] == home[None, :]] = -np.inf
    before_s = float((rows_to_hosts(owned_PE, chance_E, pairs_EE) * second_s_P).sum())
    for flat in np.argsort(-joined, axis=None, kind="stable")[:8].tolist():
        first, second = divmod(flat, len(home))
        if not joined[first, second] > 0:
            break
        _exchange(layers, row, first, second, int(home[first]), int(home[second]))
        after_s = float((rows_to_hosts(owned_PE, chance_E, pairs_EE) * second_s_P).sum())
        if before_s - after_s > least_s and float(smooth_max(layers.host_times(row))) <= limit_s:
            return before_s - after_s
        _exchange(layers, row, second, first, int(home[first]), int(home[second]))
    return 0.0


def _exchange(layers: Layers, row: int, first: int, second: int, first_home: int, second_home: int) -> None:
    """`first` leaves `first_home` for `second_home`, and `second` the other way."""
    layers.take(row, first, first_home)
    layers.take(row, second, second_home)
    layers.give(row, first, second_home)
    layers.give(row, second, first_home)
