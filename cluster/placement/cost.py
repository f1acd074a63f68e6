"""What a placement costs: each host's time for each layer, in the regime that binds.

Three regimes, kept apart because they want different placements: bound by compute (prefill: time follows rows, so split
the hot experts), by memory (decode: time follows distinct experts touched, so a split only adds reading), by the
network (time follows rows sent, and a token goes once to each host, so experts used together belong together).
Phases are apart as well: each has its own loads, its own regime, and the layer waits for its busiest host in each.

Shapes: F phases, L MoE layers in the model's order, E experts of a layer, P hosts in the order of their index.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum

import numpy as np

from cluster.types import Phase, Tier


class Regime(StrEnum):
    """What a host's time follows.

    Groundwork: NETWORK, for hosts on a slow network. Missing: hosts measure no time of a row on the wire
    (`PlacementHost.link_row_s` is 0 live), so no phase is ever found to be in it.
    """

    COMPUTE = "compute"  # rows
    MEMORY = "memory"  # distinct experts
    NETWORK = "network"  # rows sent there and back


@dataclass(frozen=True, slots=True, kw_only=True)
class PlacementHost:
    """One expert host that can take experts. Times in seconds, as measured (HostReport); 0: not measured yet.

    capacity: experts that its fast tier holds, ram_capacity those of the tier below. expert_s: one distinct expert,
    row_s: one row of one. link_row_s: a row there and back. miss_s: getting an expert from a slower tier.
    is_draining: it still serves, and is to own nothing. comes: it has joined, or was emptied and is used again: its
    share is not weighed.
    """

    index: int
    node_id: str = ""
    capacity: int
    ram_capacity: int = 0
    expert_s: float = 0.0
    row_s: float = 0.0
    link_row_s: float = 0.0
    miss_s: Mapping[Tier, float] = field(default_factory=dict[Tier, float])
    is_draining: bool = False
    comes: bool = False


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PhaseLoad:
    """What is to be expected of a phase.

    expected_LE: activations as forecast (forecast.py), any scale: only shares count. tokens_per_s: rows that enter a
    layer. rows_per_batch: of them in one host batch.
    """

    expected_LE: np.ndarray
    tokens_per_s: float
    rows_per_batch: float = 1.0


@dataclass(frozen=True, slots=True, eq=False)
class Demand:
    """One phase in its regime. amount_LE: units per second, unit_s_P: seconds that each host takes for a unit."""

    phase: Phase
    regime: Regime
    amount_LE: np.ndarray
    unit_s_P: np.ndarray


def demands_of(loads: Mapping[Phase, PhaseLoad], hosts: Sequence[PlacementHost], top_k: int) -> list[Demand]:
    """Every phase that has any load, in the regime that takes longest there; none while hosts have measured nothing."""
    found = [
        _demand(phase, loads[phase], hosts, top_k)
        for phase in Phase
        if phase in loads and loads[phase].tokens_per_s > 0 and loads[phase].expected_LE.sum() > 0
    ]
    return [demand for demand in found if demand.unit_s_P.any()]


def chances(load: PhaseLoad, top_k: int) -> np.ndarray:
    """The chance that a token activates an expert, (L, E); a layer's sum to `top_k` unless some reach 1."""
    total = load.expected_LE.sum(axis=1, keepdims=True)
    return np.clip(top_k * load.expected_LE / np.where(total > 0, total, 1.0), 0.0, 1.0)


def _demand(phase: Phase, load: PhaseLoad, hosts: Sequence[PlacementHost], top_k: int) -> Demand:
    chance_LE = chances(load, top_k)
    rows = max(load.rows_per_batch, 1.0)
    touched_LE = 1.0 - (1.0 - chance_LE) ** rows  # in one batch (EPS-MoE's expected number of distinct experts)
    seconds = {
        Regime.MEMORY: measured([host.expert_s for host in hosts]),
        Regime.COMPUTE: measured([host.row_s for host in hosts]),
        Regime.NETWORK: measured([host.link_row_s for host in hosts]),
    }
    units = {
        Regime.MEMORY: touched_LE,
        Regime.COMPUTE: rows * chance_LE,
        Regime.NETWORK: rows * chance_LE,
    }
    batch_s = {regime: float(units[regime].sum() * seconds[regime].mean()) for regime in units}
    regime = max(batch_s, key=batch_s.__getitem__)
    return Demand(phase, regime, units[regime] * (load.tokens_per_s / rows), seconds[regime])


def measured(values: Sequence[float]) -> np.ndarray:
    """Times with the mean of the others where nothing was measured yet; zeros if nothing was at all."""
    array = np.array(values, dtype=np.float64)
    known = array > 0
    return np.where(known, array, array[known].mean()) if known.any() else array


def expert_times(demand: Demand, owned_LPE: np.ndarray) -> np.ndarray:
    """Seconds per second that each owner of an expert spends on it, (L, E).

    Owners share an expert by their speed, so all of them spend the same: the amount over the sum of their speeds.
    """
    speed_P = 1.0 / np.maximum(demand.unit_s_P, 1e-15)
    speeds_LE = np.einsum("p,lpe->le", speed_P, owned_LPE.astype(np.float64))
    return np.divide(demand.amount_LE, speeds_LE, out=np.zeros_like(demand.amount_LE), where=speeds_LE > 0)


def host_times(demand: Demand, owned_LPE: np.ndarray) -> np.ndarray:
    """Seconds per second that each host is busy with each layer, (L, P)."""
    return np.einsum("le,lpe->lp", expert_times(demand, owned_LPE), owned_LPE.astype(np.float64))


def busiest_s(demands: Sequence[Demand], owned_LPE: np.ndarray) -> float:
    """What is to be made small: every layer waits for its busiest host, in every phase. Seconds per second served."""
    return float(sum(host_times(demand, owned_LPE).max(axis=1).sum() for demand in demands))


def balance(demands: Sequence[Demand], owned_LPE: np.ndarray) -> float:
    """Largest over mean time of the hosts, each layer weighed by its load; 1 is level, and 1 without any load."""
    times = [host_times(demand, owned_LPE) for demand in demands]
    mean = sum(float(each.mean(axis=1).sum()) for each in times)
    return sum(float(each.max(axis=1).sum()) for each in times) / mean if mean > 0 else 1.0


def rows_to_hosts(owned_PE: np.ndarray, chance_E: np.ndarray, pairs_EE: np.ndarray) -> np.ndarray:
    """The chance that a token needs each host, (P,): what one layer sends when a token goes once to each host.

    From single and pair chances alone: Dawson and Sankoff's (1967) bound, the sharpest that these allow.

    Args:
        pairs_EE: chance that a token activates both; symmetric, the diagonal is ignored.
    """
    owned = owned_PE.astype(np.float64)
    share_PE = owned / np.maximum(owned.sum(axis=0), 1.0)
    off = pairs_EE - np.diag(np.diag(pairs_EE))
    once_P = share_PE @ chance_E
    twice_P = 0.5 * np.einsum("pe,ef,pf->p", share_PE, off, share_PE)
    return pair_bound(once_P, twice_P)


def pair_bound(once: np.ndarray, twice: np.ndarray) -> np.ndarray:
    """Chance of at least one of several events from the sums of single and of pair chances."""
    k = 1.0 + np.floor(2.0 * np.divide(twice, once, out=np.zeros_like(once), where=once > 0))
    return np.clip(2.0 * once / (k + 1.0) - 2.0 * twice / (k * (k + 1.0)), 0.0, 1.0)


def touch_rates(loads: Mapping[Phase, PhaseLoad], top_k: int, num_layers: int, num_experts: int) -> np.ndarray:
    """Batches per second that need each expert, all phases together, (L, E)."""
    total = np.zeros((num_layers, num_experts))
    for load in loads.values():
        if load.tokens_per_s > 0:
            rows = max(load.rows_per_batch, 1.0)
            total += (1.0 - (1.0 - chances(load, top_k)) ** rows) * (load.tokens_per_s / rows)
    return total


def reading_s(host: PlacementHost) -> float:
    """What an expert costs that is in none of the host's memories."""
    return host.miss_s.get(Tier.DISK, max(host.miss_s.values(), default=0.0))
