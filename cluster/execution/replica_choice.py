"""Which replica computes what of one layer's batch, where experts have several owners. Pure, quick: on the step path.

Two regimes. Bound by memory, a host's time is the number of distinct experts it touches, so an expert goes to one
owner, the one that touches fewest (AEBS of Janus, arXiv 2512.13525). Bound by compute, it is the number of rows, so an
expert's rows are dealt out until its owners are level (what FineMoE's linear program does, greedily).

Each caller decides from its own batch, so that nobody waits for anybody. Any choice is correct: all replicas are equal.

Shapes: T token rows, K experts per token (top-k), E experts of the layer, P hosts in the caller's own numbering.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

import numpy as np

from cluster.placement.cost import Regime

NOBODY = -1  # no host owns the expert
SKIPPED = -2  # not an expert: a choice that is not part of the batch


@dataclass(frozen=True, slots=True, eq=False)
class LayerReplicas:
    """Owners of one layer's experts, arranged once for each placement.

    sole: (E + 1,) int16, the owner; of several the first; NOBODY; the last entry is SKIPPED.
    replicated: experts with several owners, ascending, with these. has_one: (E,) bool, those with exactly one.
    """

    sole: np.ndarray
    has_one: np.ndarray
    replicated: tuple[tuple[int, tuple[int, ...]], ...]

    @classmethod
    def of(cls, owned: Sequence[Collection[int]], num_experts: int) -> LayerReplicas:
        """Args: owned: experts of the layer that host 0, 1, ... owns."""
        owners: list[list[int]] = [[] for _ in range(num_experts)]
        for host, experts in enumerate(owned):
            for expert in experts:
                owners[expert].append(host)
        sole = [hosts[0] if hosts else NOBODY for hosts in owners]
        several = tuple((expert, tuple(hosts)) for expert, hosts in enumerate(owners) if len(hosts) > 1)
        has_one: np.ndarray = np.array([len(hosts) == 1 for hosts in owners], dtype=bool)
        return cls(np.array([*sole, SKIPPED], dtype=np.int16), has_one, several)


@dataclass(frozen=True, slots=True)
class ReplicaCosts:
    """Seconds that each host takes: for a distinct expert, for a row of one, for a row's way there and back."""

    expert_s: tuple[float, ...]
    row_s: tuple[float, ...]
    link_row_s: tuple[float, ...]

    @classmethod
    def measured(
        cls, expert_s: Sequence[float], row_s: Sequence[float], link_row_s: Sequence[float] | None = None
    ) -> ReplicaCosts:
        """What was not measured yet (0) is taken to be as the mean of the others; if nothing was, experts count."""
        link = tuple(link_row_s) if link_row_s is not None else (0.0,) * len(expert_s)
        return cls(_filled(expert_s, 1.0), _filled(row_s, 1e-6), link)


def choose_replicas(ids_TK: np.ndarray, replicas: LayerReplicas, costs: ReplicaCosts) -> np.ndarray:
    """The host of every choice, (T, K) int16; NOBODY or SKIPPED where there is none.

    Args:
        ids_TK: chosen experts; E for a choice that is not part of this batch.
    """
    if not replicas.replicated:
        return replicas.sole[ids_TK]
    num_experts = len(replicas.sole) - 1
    rows_E = np.bincount(ids_TK.ravel(), minlength=num_experts + 1)[:num_experts]
    if batch_regime(rows_E, costs) is Regime.MEMORY:
        return choose_fewest_experts(rows_E, replicas, costs)[ids_TK]
    return split_rows(ids_TK, rows_E, replicas, costs)


def batch_regime(rows_E: np.ndarray, costs: ReplicaCosts) -> Regime:
    """Whether reading distinct experts or computing rows takes the hosts longer."""
    reading_s = int(np.count_nonzero(rows_E)) * sum(costs.expert_s)
    return Regime.MEMORY if reading_s >= int(rows_E.sum()) * sum(costs.row_s) else Regime.COMPUTE


def choose_fewest_experts(rows_E: np.ndarray, replicas: LayerReplicas, costs: ReplicaCosts) -> np.ndarray:
    """AEBS: the host of every expert, (E + 1,) int16.

    Activated experts with one owner are charged to it; the others, in the order of their ids, go to the owner that is
    done first, which of equal hosts is the one with the fewest experts so far. Of equals the nearest is taken.
    """
    table = replicas.sole.copy()
    busy = _sole_time(rows_E, replicas, costs, row_s=None)
    rows: list[int] = rows_E.tolist()
    for expert, owners in replicas.replicated:
        if rows[expert]:
            host = _first_done(owners, busy, costs)
            busy[host] += costs.expert_s[host]
            table[expert] = host
    return table


def split_rows(ids_TK: np.ndarray, rows_E: np.ndarray, replicas: LayerReplicas, costs: ReplicaCosts) -> np.ndarray:
    """Rows of an expert over its owners so that these end level: the host of every choice, (T, K) int16.

    The experts with most rows are dealt out first. An owner that would only begin when the others are done gets none,
    so that nobody reads an expert for a handful of rows.
    """
    row_s = [compute_s + link_s for compute_s, link_s in zip(costs.row_s, costs.link_row_s, strict=True)]
    busy = _sole_time(rows_E, replicas, costs, row_s=row_s)
    rows: list[int] = rows_E.tolist()
    table, split = replicas.sole.copy(), list[tuple[int, list[tuple[int, int]]]]()
    for expert, owners in sorted(replicas.replicated, key=lambda entry: (-rows[entry[0]], entry[0])):
        if not rows[expert]:
            break
        shares = _level_shares(owners, busy, rows[expert], row_s, costs)
        for host, count in shares:
            busy[host] += costs.expert_s[host] + count * row_s[host]
        table[expert] = shares[0][0]
        if len(shares) > 1:
            split.append((expert, shares))
    if not split:
        return table[ids_TK]
    flat_ids = ids_TK.reshape(-1)
    order = flat_ids.astype(np.int16).argsort(kind="stable")  # of 16 bits: counted, not compared
    by_expert = table[flat_ids[order]]
    ends: list[int] = np.cumsum(rows_E).tolist()
    for expert, shares in split:
        begin = ends[expert] - rows[expert]
        for host, count in shares:
            by_expert[begin : begin + count] = host
            begin += count
    hosts = np.empty_like(by_expert)
    hosts[order] = by_expert
    return hosts.reshape(ids_TK.shape)


def _first_done(owners: tuple[int, ...], busy: list[float], costs: ReplicaCosts) -> int:
    best, done, way = -1, 0.0, 0.0
    for host in owners:
        ends, link_s = busy[host] + costs.expert_s[host], costs.link_row_s[host]
        if best < 0 or ends < done or (ends == done and link_s < way):
            best, done, way = host, ends, link_s
    return best


def _level_shares(
    owners: tuple[int, ...], busy: list[float], num_rows: int, row_s: list[float], costs: ReplicaCosts
) -> list[tuple[int, int]]:
    """How many rows each owner gets, so that all are done together; those that get none are left out."""
    starts = sorted((busy[host] + costs.expert_s[host], host) for host in owners)
    rate = done = level = 0.0
    used = 0
    for start, host in starts:
        if used and start >= level:
            break
        rate += 1.0 / row_s[host]
        done += start / row_s[host]
        level = (num_rows + done) / rate
        used += 1
    shares: list[tuple[int, int]] = []
    exact, given = 0.0, 0
    for start, host in starts[:used]:
        exact += (level - start) / row_s[host]
        count = round(exact) - given
        given += count
        if count:
            shares.append((host, count))
    return shares


def _sole_time(
    rows_E: np.ndarray, replicas: LayerReplicas, costs: ReplicaCosts, *, row_s: list[float] | None
) -> list[float]:
    """Seconds of every host for the experts that it alone owns; without `row_s` for touching them only."""
    alone = np.flatnonzero((rows_E > 0) & replicas.has_one)
    owner = replicas.sole[alone]
    num_hosts = len(costs.expert_s)
    touched: list[int] = np.bincount(owner, minlength=num_hosts).tolist()
    busy = [count * expert_s for count, expert_s in zip(touched, costs.expert_s, strict=True)]
    if row_s is not None:
        rows: list[float] = np.bincount(owner, weights=rows_E[alone], minlength=num_hosts).tolist()
        busy = [time_s + count * each_s for time_s, count, each_s in zip(busy, rows, row_s, strict=True)]
    return busy


def _filled(values: Sequence[float], default: float) -> tuple[float, ...]:
    known = [value for value in values if value > 0]
    mean = sum(known) / len(known) if known else default
    return tuple(value if value > 0 else mean for value in values)
