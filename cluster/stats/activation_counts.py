"""Activation counts by phase, layer and expert, their sums and their balance. Knows numbers; knows no storage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeAlias

from cluster.types import Phase

Counts: TypeAlias = dict[Phase, dict[int, dict[int, int]]]
"""`counts[phase][layer][expert]`: how often the gate chose the expert."""

Deltas: TypeAlias = Mapping[Phase, Mapping[int, Mapping[int, int]]]
"""Counts to add, in the same shape."""


def add_counts(into: Counts, deltas: Deltas) -> None:
    """Add `deltas` to `into`, in place; the result has one entry per expert, however often this is called."""
    for phase, by_layer in deltas.items():
        rows = into.setdefault(phase, {})
        for layer, by_expert in by_layer.items():
            row = rows.setdefault(layer, {})
            for expert, count in by_expert.items():
                row[expert] = row.get(expert, 0) + count


def copy_counts(counts: Deltas) -> Counts:
    """An independent copy."""
    return {
        phase: {layer: dict(by_expert) for layer, by_expert in by_layer.items()} for phase, by_layer in counts.items()
    }


def subtract_counts(counts: Deltas, part: Deltas) -> Counts:
    """`counts` without `part`."""
    difference = copy_counts(counts)
    for phase, by_layer in difference.items():
        for layer, row in by_layer.items():
            for expert, count in part.get(phase, {}).get(layer, {}).items():
                if expert in row:
                    row[expert] -= count
    return difference


def load_balance(counts: Sequence[int]) -> float | None:
    """Largest over mean count of a layer's experts: 1 is even, len(counts) is all on one; None of no counts."""
    total = sum(counts)
    return max(counts) * len(counts) / total if total else None
