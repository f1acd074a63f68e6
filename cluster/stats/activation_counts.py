"""Activation counts by layer and expert, and their sum. Knows numbers; knows no storage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

Counts: TypeAlias = dict[int, dict[int, int]]
"""`counts[layer][expert]`: how often the gate chose the expert."""


def add_counts(into: Counts, deltas: Mapping[int, Mapping[int, int]]) -> None:
    """Add `deltas` to `into`, in place; the result has one entry per expert, however often this is called."""
    for layer, by_expert in deltas.items():
        row = into.setdefault(layer, {})
        for expert, count in by_expert.items():
            row[expert] = row.get(expert, 0) + count


def copy_counts(counts: Mapping[int, Mapping[int, int]]) -> Counts:
    """An independent copy."""
    return {layer: dict(by_expert) for layer, by_expert in counts.items()}


def subtract_counts(counts: Mapping[int, Mapping[int, int]], part: Mapping[int, Mapping[int, int]]) -> Counts:
    """`counts` without `part`."""
    return {
        layer: {expert: count - part.get(layer, {}).get(expert, 0) for expert, count in by_expert.items()}
        for layer, by_expert in counts.items()
    }
