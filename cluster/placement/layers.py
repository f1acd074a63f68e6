"""A placement while it is being changed: who owns what, how busy everybody is, how much room is left.

Shapes: F demands (phases), L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.cost import Demand

_NORM = 32  # of the smooth maximum: P hosts that are level count 2% (P = 2) to 14% (P = 64) above the true one


@dataclass(slots=True, eq=False)
class Layers:
    """All layers under change. Owners of an expert share it by their speed (cost.py).

    owned_LPE: bool. limit_P: experts that a host may own over all layers. amount_FLE, speed_FP: see cost.Demand.
    """

    owned_LPE: np.ndarray
    limit_P: np.ndarray
    amount_FLE: np.ndarray
    speed_FP: np.ndarray

    @classmethod
    def of(cls, owned_LPE: np.ndarray, limit_P: np.ndarray, demands: Sequence[Demand]) -> Layers:
        """A copy to change. Without any demand all experts count the same, so that repair spreads them evenly."""
        num_layers, num_hosts, num_experts = owned_LPE.shape
        if demands:
            amount = np.stack([demand.amount_LE for demand in demands])
            speed = np.stack([1.0 / np.maximum(demand.unit_s_P, 1e-15) for demand in demands])
        else:
            amount, speed = np.ones((1, num_layers, num_experts)), np.ones((1, num_hosts))
        return cls(owned_LPE.copy(), limit_P.copy(), amount, speed)

    def copy(self) -> Layers:
        """The same owners, to change by themselves; loads and speeds are shared."""
        return Layers(self.owned_LPE.copy(), self.limit_P, self.amount_FLE, self.speed_FP)

    def within(self, limit_P: np.ndarray) -> Layers:
        """A copy with other limits."""
        return Layers(self.owned_LPE.copy(), limit_P, self.amount_FLE, self.speed_FP)

    def canonical_order(self) -> tuple[np.ndarray, np.ndarray]:
        """An order of hosts (P,) and of each layer's experts (L, E) that does not depend on their numbers: by what they
        are and how busy. A search in this order finds the same whatever hosts and experts are called; only where two
        are equal in everything do numbers decide.
        """
        times_LFP = np.stack([self.host_times(row) for row in range(len(self.owned_LPE))])
        scale = max(float(times_LFP.max()), 1e-300)
        by_layer = np.rint(times_LFP.reshape(-1, len(self.limit_P)) / scale * 1e9)  # sums in another order differ
        hosts = np.lexsort((*by_layer[::-1], by_layer.sum(axis=0), *self.speed_FP, self.limit_P))
        experts = [
            np.lexsort((*self.amount_FLE[:, row], -self.amount_FLE[:, row].sum(axis=0)))
            for row in range(len(self.owned_LPE))
        ]
        return hosts, np.stack(experts)

    def ordered(self, hosts: np.ndarray, experts_LE: np.ndarray) -> Layers:
        """The same with hosts and experts in another order."""
        owned = np.take_along_axis(self.owned_LPE[:, hosts], experts_LE[:, None, :], axis=2)
        amount = np.take_along_axis(self.amount_FLE, experts_LE[None], axis=2)
        return Layers(owned, self.limit_P[hosts], amount, self.speed_FP[:, hosts])

    def room(self) -> np.ndarray:
        """How many more experts each host may own; negative where it owns too many."""
        return self.limit_P - self.owned_LPE.sum(axis=(0, 2))

    def expert_times(self, layer: int) -> np.ndarray:
        """Seconds per second that each owner spends on each expert, (F, E); of experts without owners, if one did."""
        speeds_FE: np.ndarray = self.speed_FP @ self.owned_LPE[layer]
        alone_F1: np.ndarray = self.speed_FP.mean(axis=1, keepdims=True)
        return np.divide(self.amount_FLE[:, layer], np.where(speeds_FE > 0, speeds_FE, alone_F1))

    def host_times(self, layer: int) -> np.ndarray:
        """Seconds per second that each host is busy with the layer, (F, P)."""
        times_FP: np.ndarray = self.expert_times(layer) @ self.owned_LPE[layer].T
        return times_FP

    def give(self, layer: int, expert: int, host: int) -> None:
        self.owned_LPE[layer, host, expert] = True

    def take(self, layer: int, expert: int, host: int) -> None:
        self.owned_LPE[layer, host, expert] = False


def smooth_max(times: np.ndarray) -> np.ndarray:
    """A norm over the last axis, summed over the first: the largest time, and a little of the next largest.

    The maximum alone is blind to a step that relieves one of two equally busy hosts.
    """
    largest = times.max(axis=-1, keepdims=True)
    scaled = np.divide(times, largest, out=np.zeros_like(times), where=largest > 0)
    return (largest[..., 0] * (scaled**_NORM).sum(axis=-1) ** (1.0 / _NORM)).sum(axis=0)
