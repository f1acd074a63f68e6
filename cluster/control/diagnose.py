"""Is it worth it? What counts alone say of placement, replication and semantic routing, before anything is moved.

Pure. Everything is predicted from one period and, where a second is known, scored on that one: figures of the period
that was planned on flatter. "Leave it off" is an answer.

Shapes: G kinds of prompt (clusters, or domains of a trace), L MoE layers, E experts of a layer.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from cluster.placement.cost import PhaseLoad, PlacementHost, balance, demands_of
from cluster.placement.forecast import forecast, persistence, reliability
from cluster.placement.inputs import PlacementInputs, own_limits, owned_array
from cluster.placement.layers import Layers
from cluster.placement.planner import present_balance, present_owners
from cluster.placement.rebuild import rebuild
from cluster.semantics.gain import predicted_misses
from cluster.status.diagnosis import Diagnosis, PhaseDiagnosis, SemanticDiagnosis
from cluster.types import Phase

_WORTH = 0.05  # of the time: less is within what loads change by themselves
_LASTS = 0.5  # of the deviations; below, a plan is out of date when it is done


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DiagnosisInputs:
    """One period's statistics. `placement`: hosts, rates and the present placement; `counts`: decayed activations.
    has_hosts: else one host stands for the workers' own memories.

    later: the same of the period after, where it is known. kinds: (G, L, E) decode activations by kind of prompt, and
    kinds_later. mutual_information: bits per layer that the kind tells of the expert. spare: shares of more room for
    replicas to try. num_workers, caches: attention workers, and shares of all experts that each keeps.
    """

    placement: PlacementInputs
    has_hosts: bool = True
    counts: Mapping[Phase, np.ndarray]
    later: Mapping[Phase, np.ndarray] | None = None
    kinds: np.ndarray | None = None
    kinds_later: np.ndarray | None = None
    mutual_information: float | None = None
    spare: Sequence[float] = (0.0, 0.125, 0.25)
    num_workers: int = 4
    caches: Sequence[float] = (0.25, 0.5)


def diagnose(inputs: DiagnosisInputs) -> Diagnosis:
    """Skew, persistence, what replication and semantic routing would bring, and the advice that follows."""
    phases = tuple(
        _phase(inputs, phase) for phase in Phase if phase in inputs.placement.loads and inputs.counts[phase].sum() > 0
    )
    semantic = None
    if inputs.kinds is not None and len(inputs.kinds) > 1 and inputs.kinds.sum() > 0:
        scored_on = inputs.kinds if inputs.kinds_later is None else inputs.kinds_later
        semantic = SemanticDiagnosis(
            num_kinds=len(inputs.kinds),
            num_workers=inputs.num_workers,
            mutual_information=inputs.mutual_information,
            misses={
                cache: predicted_misses(inputs.kinds, scored_on, inputs.num_workers, cache) for cache in inputs.caches
            },
        )
    advice = (*_placement_advice(inputs, phases), *_semantic_advice(inputs, semantic))
    return Diagnosis(
        scored=inputs.later is not None,
        num_hosts=len(inputs.placement.owners) if inputs.has_hosts else 0,
        balance_now=present_balance(inputs.placement) if inputs.has_hosts else None,
        phases=phases,
        semantic=semantic,
        advice=advice,
    )


def gini(counts: np.ndarray) -> float:
    """Gini's coefficient: 0 when all are equal, near 1 when one has all."""
    ordered = np.sort(counts.astype(np.float64))
    total, n = ordered.sum(), len(ordered)
    # Not below 0 by rounding, where all are equal.
    return max(0.0, float((2.0 * np.arange(1, n + 1) - n - 1) @ ordered / (n * total))) if total > 0 else 0.0


def _phase(inputs: DiagnosisInputs, phase: Phase) -> PhaseDiagnosis:
    counts = inputs.counts[phase]
    used = counts[counts.sum(axis=1) > 0]  # what was not asked says nothing of how evenly it is asked
    ratios = used.max(axis=1) / used.mean(axis=1)
    later = None if inputs.later is None else inputs.later[phase]
    lasts = None if later is None else persistence(counts, later)
    load = inputs.placement.loads[phase]
    planned = replace(load, expected_LE=forecast(counts, 1.0 if lasts is None else lasts))
    scored = load if later is None else replace(load, expected_LE=later)
    found = demands_of({phase: scored}, inputs.placement.owners, inputs.placement.top_k)
    present = present_owners(inputs.placement, found)
    return PhaseDiagnosis(
        phase=phase,
        regime=str(found[0].regime) if found else "",
        activations=float(counts.sum()),
        max_over_mean=float(ratios.mean()),
        max_over_mean_worst=float(ratios.max()),
        gini=float(np.mean([gini(row) for row in used])),
        reliability=float(reliability(used).mean()),
        persistence=lasts,
        balance_now=balance(found, present),
        balance_then={share: _planned_balance(inputs, phase, planned, scored, share) for share in inputs.spare},
    )


def _planned_balance(
    inputs: DiagnosisInputs, phase: Phase, planned: PhaseLoad, scored: PhaseLoad, spare: float
) -> float:
    """Balance under the second load of a placement made for the first, with room for so many replicas more."""
    placement = inputs.placement
    owners = placement.owners
    total = len(placement.layers) * placement.num_experts
    share = np.array([max(host.capacity, 1) for host in owners], dtype=np.float64)
    room = [int(-(-total * (1.0 + spare) * part // share.sum())) for part in share]
    demands = demands_of({phase: planned}, owners, placement.top_k)
    if not demands:
        return 1.0
    limits = own_limits(room, len(placement.layers), placement.num_experts)
    layers = Layers.of(owned_array(placement), limits, demands)
    rebuild(layers)
    return balance(demands_of({phase: scored}, owners, placement.top_k), layers.owned_LPE)


def _placement_advice(inputs: DiagnosisInputs, phases: Sequence[PhaseDiagnosis]) -> list[str]:
    hosts: Sequence[PlacementHost] = inputs.placement.owners
    if len(hosts) < 2:
        return ["placement: leave it off (scheduler.placement: fixed): there is nothing to balance on one host."]
    told: list[str] = []
    for phase in phases:
        name = f"placement for {phase.phase}"
        if phase.persistence is not None and phase.persistence < _LASTS:
            told.append(
                f"{name}: leave it off: only {phase.persistence:.0%} of the differences between experts last from one "
                "period to the next."
            )
            continue
        saved = {share: 1.0 - then / phase.balance_now for share, then in phase.balance_then.items()}
        alone = saved.get(0.0, 0.0)
        best = max(saved, key=lambda share: (round(saved[share], 2), -share))
        if saved[best] < _WORTH:
            told.append(
                f"{name}: leave it off: hosts are at {phase.balance_now:.2f}x the mean, no arrangement saves "
                f"{_WORTH:.0%} of the experts' time."
            )
            continue
        told.append(
            f"{name}: on. Rearranging alone takes the busiest host from {phase.balance_now:.2f}x the mean to "
            f"{phase.balance_then.get(0.0, phase.balance_now):.2f}x ({alone:.0%} of the experts' time)."
        )
        if saved[best] - alone >= _WORTH:
            told.append(
                f"replicas for {phase.phase}: room for {best:.0%} more experts (experts.host_cache) takes it to "
                f"{phase.balance_then[best]:.2f}x."
            )
        else:
            told.append(f"replicas for {phase.phase}: not for balance: they save less than {_WORTH:.0%} more.")
    return told


def _semantic_advice(inputs: DiagnosisInputs, found: SemanticDiagnosis | None) -> list[str]:
    if inputs.num_workers < 2:
        return ["semantic routing: leave it off (scheduler.routing: least-loaded): there is one attention worker."]
    if found is None:
        reason = "nothing was learned of prompts yet" if inputs.kinds is None else "all prompts counted are of one kind"
        return [f"semantic routing: not known: {reason}."]
    best = min(found.misses, key=lambda share: found.misses[share])
    ratio = found.misses[best]
    bits = "" if found.mutual_information is None else f" ({found.mutual_information:.3f} bits of each layer's choice)"
    if ratio > 1.0 - _WORTH:
        return [
            f"semantic routing: leave it off: what a prompt is about tells too little of its experts{bits}; misses "
            f"would be {ratio:.2f}x those of any routing."
        ]
    return [
        f"semantic routing: on. Workers that specialise would miss {ratio:.2f}x as often at a cache of {best:.0%}"
        f"{bits}, if several sequences run on each; alone on a worker, a sequence fills the cache by itself."
    ]
