"""What a placement means for single batches: distinct experts of the busiest host, rows of the busiest, rows sent.

Batches are decode rows of held-out requests, each of another request, as a server would step them together.

Shapes: T rows of a batch, K experts per token, L MoE layers, P hosts, E experts of a layer.
"""

from __future__ import annotations

import time
import timeit
from collections.abc import Callable
from dataclasses import replace

import numpy as np

from benchmarks.placement.methods import TOKENS_PER_S, as_copies, contiguous, inputs_for, ours, transfers
from benchmarks.placement.sources import counts_of, pair_chances
from benchmarks.shared.report import Report
from cluster.execution.replica_choice import (
    LayerReplicas,
    ReplicaCosts,
    choose_fewest_experts,
    choose_replicas,
    split_rows,
)
from cluster.placement import PhaseLoad, plan_placement
from cluster.policies.trace import GateTrace
from cluster.types import Phase

_HOSTS, _SPARE = 4, 0.25
_ROWS = (8, 32)
_HIDDEN_BYTES = 2 * 256  # of the demo model: a bfloat16 row

Choose = Callable[[np.ndarray, LayerReplicas], np.ndarray]


def batch_rows(report: Report, past: GateTrace, held_out: GateTrace, num_batches: int) -> None:
    """Targets and notes: AEBS against other choices of replicas, splitting, and rows that leave the worker."""
    top_k, counts = past.model.top_k, counts_of(past, Phase.DECODE)
    blocks = contiguous(*counts.shape, _HOSTS)
    planned, _ = ours(counts, top_k, _HOSTS, _SPARE)
    costs = ReplicaCosts.measured([1e-3] * _HOSTS, [1e-5] * _HOSTS)

    def aebs(ids: np.ndarray, replicas: LayerReplicas) -> np.ndarray:
        return choose_fewest_experts(_rows_of(ids, replicas), replicas, costs)[ids]

    told: list[str] = []
    for rows in _ROWS:
        batches = _batches(held_out, rows, num_batches)
        by_experts = _memory_bound(counts, top_k, rows)
        ways: dict[str, tuple[np.ndarray, Choose]] = {
            "contiguous": (blocks, _first),
            "planned for rows, first replica": (planned, _first),
            "by position (vLLM)": (planned, _by_position),
            "AEBS": (planned, aebs),
            "planned for distinct experts, AEBS": (by_experts, aebs),
        }
        most = {name: _most_experts(copies, batches, choose) for name, (copies, choose) in ways.items()}
        told.append(f"{rows} rows: " + ", ".join(f"{name} {value:.2f}" for name, value in most.items()))
        report.at_most(
            f"AEBS: distinct experts of the busiest host over choosing by position, {rows} rows",
            most["AEBS"] / most["by position (vLLM)"],
            1.0,
        )
        report.at_most(
            f"planned for distinct experts: those of the busiest host over contiguous, {rows} rows",
            most["planned for distinct experts, AEBS"] / most["contiguous"],
            1.0,
        )
    report.notes.append(
        f"distinct experts of the busiest of {_HOSTS} hosts in a layer, {_SPARE:.0%} room; " + "; ".join(told)
    )
    _splitting(report, planned, held_out, num_batches)
    _network(report, past, held_out)


def replica_choice_time(report: Report) -> None:
    """What choosing costs on the step path: 64 experts, a quarter of them on two of 4 hosts, 8 rows of 8."""
    owned = [set(range(host, 64, 4)) for host in range(4)]
    for expert in range(16):
        owned[(expert + 1) % 4].add(expert)
    replicas, rng = LayerReplicas.of(owned, 64), np.random.default_rng(0)
    ids = np.stack([rng.permutation(64)[:8] for _ in range(8)])
    told: list[str] = []
    for name, costs in (
        ("AEBS", ReplicaCosts.measured([1e-3] * 4, [1e-6] * 4)),
        ("splitting", ReplicaCosts.measured([1e-6] * 4, [1e-3] * 4)),
    ):
        choose: Callable[[], object] = lambda costs=costs: choose_replicas(ids, replicas, costs)  # noqa: E731
        took_us = 1e6 * min(timeit.repeat(choose, number=200, repeat=20, timer=time.process_time)) / 200
        told.append(f"{name} {took_us:.0f} us")
    case = "64 experts, 16 of them twice, 8 rows, 4 hosts"
    report.notes.append(f"choosing replicas for a layer ({case}): {', '.join(told)} of processor time")


def _memory_bound(counts_LE: np.ndarray, top_k: int, rows: int) -> np.ndarray:
    """Planned for hosts whose time follows the distinct experts of batches of so many rows."""
    inputs = inputs_for(counts_LE, top_k, _HOSTS, _SPARE)
    load = replace(inputs.loads[Phase.DECODE], rows_per_batch=float(rows))
    hosts = tuple(replace(host, row_s=0.0, expert_s=1e-3) for host in inputs.hosts)
    bound = replace(inputs, hosts=hosts, loads={Phase.DECODE: load})
    return as_copies(bound, plan_placement(bound).placement)


def _batches(trace: GateTrace, num_rows: int, count: int) -> list[np.ndarray]:
    """(T, L, K) each: the next decode row of `num_rows` requests drawn by chance."""
    rng = np.random.default_rng(0)
    requests = [trace.rows_of(i) for i in range(len(trace.requests))]
    decoded = [request.chosen[request.is_decode].astype(np.int64) for request in requests]
    decoded = [rows for rows in decoded if len(rows)]
    return [
        np.stack([decoded[i][rng.integers(len(decoded[i]))] for i in rng.choice(len(decoded), num_rows, replace=False)])
        for _ in range(count)
    ]


def _replicas(copies_LPE: np.ndarray) -> list[LayerReplicas]:
    return [LayerReplicas.of([np.flatnonzero(host).tolist() for host in layer], layer.shape[1]) for layer in copies_LPE]


def _most_experts(copies_LPE: np.ndarray, batches: list[np.ndarray], choose: Choose) -> float:
    """Mean over batches and layers of the largest number of distinct experts that a host computes."""
    replicas, found = _replicas(copies_LPE), list[int]()
    for batch in batches:
        for layer, of_layer in enumerate(replicas):
            ids = batch[:, layer]
            hosts = choose(ids, of_layer).astype(np.int64)
            touched = np.unique(hosts * copies_LPE.shape[2] + ids)
            found.append(int(np.bincount(touched // copies_LPE.shape[2]).max()))
    return float(np.mean(found))


def _splitting(report: Report, copies_LPE: np.ndarray, trace: GateTrace, num_batches: int) -> None:
    """Rows of the busiest host over the mean in prefill chunks of 256 rows."""
    rows = trace.chosen[~trace.is_decode].astype(np.int64)
    costs = ReplicaCosts.measured([1e-6] * _HOSTS, [1e-4] * _HOSTS)
    replicas = _replicas(copies_LPE)
    starts = np.random.default_rng(0).integers(0, len(rows) - 256, size=max(5, num_batches // 10))
    chunks = [rows[start : start + 256, layer] for start in starts for layer in range(len(replicas))]

    def busiest(choose: Choose) -> float:
        hosts = [choose(ids, replicas[at % len(replicas)]) for at, ids in enumerate(chunks)]
        return float(
            np.mean([np.bincount(each.ravel(), minlength=_HOSTS).max() / each.size * _HOSTS for each in hosts])
        )

    split = busiest(lambda ids, r: split_rows(ids, _rows_of(ids, r), r, costs))
    by_position, first = busiest(_by_position), busiest(_first)
    report.notes.append(
        f"rows of the busiest host over the mean, prefill chunks of 256 rows: first replica {first:.3f}, by "
        f"position {by_position:.3f}, split level {split:.3f}"
    )
    report.at_most("splitting: rows of the busiest host over choosing by position", split / by_position, 1.0)


def _network(report: Report, past: GateTrace, held_out: GateTrace) -> None:
    """Rows that leave a worker where the network binds: a token goes once to each host with one of its experts."""
    counts = counts_of(past, Phase.DECODE)
    inputs = inputs_for(counts, past.model.top_k, _HOSTS, 0.0)
    hosts = tuple(replace(host, row_s=0.0, link_row_s=1e-3) for host in inputs.hosts)
    load = PhaseLoad(expected_LE=counts, tokens_per_s=TOKENS_PER_S)
    bound = replace(inputs, hosts=hosts, loads={Phase.DECODE: load})
    gathered = as_copies(bound, plan_placement(replace(bound, pairs=pair_chances(past))).placement)
    level = as_copies(bound, plan_placement(bound).placement)
    blocks = contiguous(*counts.shape, _HOSTS)
    chosen = held_out.chosen[held_out.is_decode].astype(np.int64)
    sent = {
        name: _hosts_per_token(copies, chosen)
        for name, copies in (("contiguous", blocks), ("levelled", level), ("levelled and gathered", gathered))
    }
    told = ", ".join(f"{name} {value:.3f} ({2 * value * _HIDDEN_BYTES:.0f} bytes)" for name, value in sent.items())
    report.notes.append(
        f"hosts that a token goes to in a layer ({_HOSTS} hosts, there and back): {told}; "
        f"gathering carried {transfers(blocks, gathered)} experts"
    )
    report.at_most(
        "network-bound: rows sent, gathered over levelled", sent["levelled and gathered"] / sent["levelled"], 0.97
    )


def _hosts_per_token(copies_LPE: np.ndarray, chosen_NLK: np.ndarray) -> float:
    """Mean over tokens and layers; without replicas."""
    home_LE = copies_LPE.argmax(axis=1)
    hosts = np.take_along_axis(home_LE[None], chosen_NLK, axis=2)
    return float(np.mean(sum((hosts == host).any(axis=2) for host in range(copies_LPE.shape[1]))))


def _rows_of(ids_TK: np.ndarray, replicas: LayerReplicas) -> np.ndarray:
    num_experts = len(replicas.has_one)
    return np.bincount(ids_TK.ravel(), minlength=num_experts + 1)[:num_experts]


def _first(ids_TK: np.ndarray, replicas: LayerReplicas) -> np.ndarray:
    return replicas.sole[ids_TK]


def _by_position(ids_TK: np.ndarray, replicas: LayerReplicas) -> np.ndarray:
    """A token's place in the batch modulo the number of replicas."""
    hosts = replicas.sole[ids_TK]
    for expert, owners in replicas.replicated:
        row, column = np.nonzero(ids_TK == expert)
        hosts[row, column] = np.array(owners, dtype=np.int16)[row % len(owners)]
    return hosts
