"""Sequences through a batcher, step by step, without an engine."""

from __future__ import annotations

from engine_builders import make_request

from actors.engine.batcher import Batcher, ScheduledRows
from actors.engine.sequence import Sequence


def add_prompt(batcher: Batcher, name: str, length: int, *, start: int = 0) -> Sequence:
    sequence = Sequence(make_request(name, prompt=range(start, start + length)))
    batcher.add(sequence)
    return sequence


def compute_rows(batcher: Batcher, planned: list[ScheduledRows], token: int = 7) -> None:
    """What the engine does with a plan, with a token out of thin air."""
    sampling = [rows.sequence for rows in planned if rows.samples]
    for rows in planned:
        batcher.on_computed(rows)
    for sequence in sampling:
        sequence.tokens.append(token)


def take_step(batcher: Batcher, token: int = 7) -> list[tuple[str, int]]:
    planned = batcher.plan()
    compute_rows(batcher, planned, token)
    return [(rows.sequence.request.request_id, rows.num_rows) for rows in planned]
