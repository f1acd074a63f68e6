"""What benchmark `placement` plans for and scores on: recorded counts of the demo model, of OLMoE and of Mixtral."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np

from benchmarks.shared.models import REPOSITORY
from cluster.cli.trace_loads import count_chosen
from cluster.policies.trace import GateTrace
from cluster.types import Phase

PUBLISHED = REPOSITORY.parent / "shared" / "data" / "traces" / "olmoe_paper_routing"
_DOMAINS = ("arxiv", "book", "c4", "github", "wikipedia")
_MODELS = (("OLMoE-1B-7B", "olmoe", 64, 8), ("Mixtral-8x7B", "mistral", 8, 2))


@dataclass(frozen=True, slots=True, eq=False)
class Periods:
    """Two periods of one model's routing, (L, E) activations each: planned on the first, scored on the second."""

    source: str
    top_k: int
    first: np.ndarray
    second: np.ndarray


def demo_periods(past: GateTrace, held_out: GateTrace) -> list[Periods]:
    """The two halves of the prompts of every domain, by phase."""
    return [
        Periods(f"demo, {phase}", past.model.top_k, counts_of(past, phase), counts_of(held_out, phase))
        for phase in (Phase.DECODE, Phase.PREFILL)
    ]


def counts_of(trace: GateTrace, phase: Phase) -> np.ndarray:
    """Activations of a phase, (L, E)."""
    rows = trace.is_decode == (phase is Phase.DECODE)
    return count_chosen(trace.chosen[rows], trace.model.num_experts).astype(np.float64)


def published_periods() -> list[tuple[str, list[Periods]]]:
    """Published counts come by domain of text, without time. So two kinds of periods are made of them.

    same mix: each period draws half as many tokens of every domain (the counts' halves, by chance). other texts: the
    first period has some of the domains, the second the others, for all ways to part five of them: as hard as a shift
    gets. Empty where the files are not there.
    """
    if not PUBLISHED.is_dir():
        return []
    found: list[tuple[str, list[Periods]]] = []
    for name, prefix, num_experts, top_k in _MODELS:
        by_domain = [_read(PUBLISHED / f"{prefix}__expert_counts__{domain}.json", num_experts) for domain in _DOMAINS]
        rng = np.random.default_rng(0)
        half = [rng.binomial(counts.astype(np.int64), 0.5).astype(np.float64) for counts in by_domain]
        rest = [counts - part for counts, part in zip(by_domain, half, strict=True)]
        found.append((f"{name}, same mix", [Periods(f"{name}, same mix", top_k, sum_of(half), sum_of(rest))]))
        shifts = [
            Periods(
                f"{name}, other texts",
                top_k,
                sum_of([by_domain[i] for i in chosen]),
                sum_of([by_domain[i] for i in range(len(_DOMAINS)) if i not in chosen]),
            )
            for size in (2, 3)
            for chosen in combinations(range(len(_DOMAINS)), size)
        ]
        found.append((f"{name}, other texts", shifts))
    return found


def sum_of(arrays: list[np.ndarray]) -> np.ndarray:
    return np.sum(arrays, axis=0)


def pair_chances(trace: GateTrace) -> np.ndarray:
    """The chance that a decoded token activates two experts both, (L, E, E)."""
    chosen = trace.chosen[trace.is_decode].astype(np.int64)
    num_rows, num_layers, _ = chosen.shape
    pairs = np.zeros((num_layers, trace.model.num_experts, trace.model.num_experts))
    for layer in range(num_layers):
        active = np.zeros((num_rows, trace.model.num_experts), dtype=np.float32)
        np.put_along_axis(active, chosen[:, layer], 1.0, axis=1)
        pairs[layer] = active.T @ active / num_rows
    return pairs


def _read(path: Path, num_experts: int) -> np.ndarray:
    """One file: a list of layers, each a mapping from the expert's number to its count."""
    layers = json.loads(path.read_text())
    counts = np.zeros((len(layers), num_experts))
    for row, layer in enumerate(layers):
        for expert, count in layer.items():
            counts[row, int(expert)] = count
    return counts
