"""What a recorded trace says of loads: the inputs of `plan --trace` and `diagnose --trace`.

Shapes: L MoE layers, E experts of a layer, G domains.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np

from cluster.errors import InvalidRequest
from cluster.placement import (
    PhaseLoad,
    PlacementHost,
    PlacementInputs,
    even_placement,
    forecast,
    persistence,
)
from cluster.placement.cost import balance, demands_of
from cluster.placement.inputs import owned_array
from cluster.placement.plan import Placement
from cluster.types import Phase, Tier

if TYPE_CHECKING:
    from cluster.policies.trace import GateTrace


@dataclass(frozen=True, slots=True, eq=False)
class TraceCounts:
    """Activations of a trace, the earlier and the later half of the requests of every domain.

    first, second: (L, E) by phase. domains, domains_later: (G, L, E) of decode.
    """

    first: Mapping[Phase, np.ndarray]
    second: Mapping[Phase, np.ndarray]
    domains: np.ndarray
    domains_later: np.ndarray


@dataclass(frozen=True, slots=True, kw_only=True)
class Rates:
    """What a trace does not tell: the cluster that it is planned for. Times in seconds, of the model's experts."""

    tokens_per_s: float
    rows: float
    prefill_rows: float
    expert_s: float
    row_s: float
    bytes_per_s: float
    spare: float
    horizon_s: float
    max_bytes: int | None


def count_trace(trace: GateTrace) -> TraceCounts:
    """Count it."""
    domains = sorted({request.domain for request in trace.requests})
    shape = (len(domains), 2, len(Phase), len(trace.model.layers), trace.model.num_experts)
    counts = np.zeros(shape)
    for place, domain in enumerate(domains):
        requests = [i for i, request in enumerate(trace.requests) if request.domain == domain]
        for turn, request in enumerate(requests):
            rows = trace.rows_of(request)
            half = int(turn >= (len(requests) + 1) // 2)
            for at, phase in enumerate(Phase):
                chosen = rows.chosen[rows.is_decode == (phase is Phase.DECODE)]
                counts[place, half, at] += count_chosen(chosen, trace.model.num_experts)
    decode = list(Phase).index(Phase.DECODE)
    both = counts.sum(axis=0)
    return TraceCounts(
        first={phase: both[0, at] for at, phase in enumerate(Phase)},
        second={phase: both[1, at] for at, phase in enumerate(Phase)},
        domains=counts[:, 0, decode],
        domains_later=counts[:, 1, decode],
    )


def count_chosen(chosen_NLK: np.ndarray, num_experts: int) -> np.ndarray:
    """Activations, (L, E), of token rows."""
    num_layers = chosen_NLK.shape[1]
    first_L1 = np.array([[layer * num_experts] for layer in range(num_layers)])
    flat: np.ndarray = np.add(chosen_NLK, first_L1, dtype=np.int64)
    return np.bincount(flat.reshape(-1), minlength=num_layers * num_experts).reshape(num_layers, num_experts)


def trace_inputs(trace: GateTrace, counts: TraceCounts, num_hosts: int, rates: Rates) -> PlacementInputs:
    """The earlier half's loads on `num_hosts` equal hosts that start with the even placement.

    Raises:
        InvalidRequest: too few requests to tell an earlier from a later half.
    """
    model = trace.model
    decoded, prefilled = (float(counts.first[phase].sum()) for phase in (Phase.DECODE, Phase.PREFILL))
    if not decoded or not counts.second[Phase.DECODE].sum():
        raise InvalidRequest(
            "the trace needs at least two requests with generated tokens: one to plan by, one to score on"
        )
    even = even_placement(model.layers, model.num_experts, num_hosts)
    share = -(-len(model.layers) * model.num_experts // num_hosts)
    capacity = max(int(share * (1.0 + rates.spare)), *(sum(map(len, own.values())) for own in even), 1)
    lasts = {phase: persistence(counts.first[phase], counts.second[phase]) for phase in Phase}
    load = {
        Phase.DECODE: (rates.tokens_per_s, rates.rows),
        Phase.PREFILL: (rates.tokens_per_s * prefilled / decoded, rates.prefill_rows),
    }
    return PlacementInputs(
        layers=model.layers,
        num_experts=model.num_experts,
        top_k=model.top_k,
        expert_bytes=model.expert_bytes,
        hosts=tuple(
            PlacementHost(
                index=index,
                node_id=f"node-{index}",
                capacity=capacity,
                expert_s=rates.expert_s,
                row_s=rates.row_s,
                miss_s={Tier.DISK: model.expert_bytes / rates.bytes_per_s},
            )
            for index in range(num_hosts)
        ),
        current=Placement(epoch=1, hosts=dict(enumerate(even))),
        loads={
            phase: PhaseLoad(
                expected_LE=forecast(counts.first[phase], lasts[phase]), tokens_per_s=tokens, rows_per_batch=rows
            )
            for phase, (tokens, rows) in load.items()
        },
        horizon_s=rates.horizon_s,
        max_bytes=rates.max_bytes,
        bytes_per_s=rates.bytes_per_s,
    )


def scored_balance(inputs: PlacementInputs, counts: TraceCounts, placement: Placement) -> float:
    """Largest over mean host load of a placement on the later half."""
    later = {
        phase: replace(load, expected_LE=counts.second[phase].astype(np.float64))
        for phase, load in inputs.loads.items()
    }
    demands = demands_of(later, inputs.owners, inputs.top_k)
    return balance(demands, owned_array(replace(inputs, current=placement)))
