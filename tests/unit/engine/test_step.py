"""Rows of a step in their order: what decodes first, then prompts of one row, then longer ones."""

from __future__ import annotations

from engine_builders import make_request

from actors.engine.batcher import ScheduledRows
from actors.engine.sequence import Sequence
from actors.engine.step import pack_rows


def _rows(name: str, *, prompt: int, generated: int, computed: int, num_rows: int) -> ScheduledRows:
    sequence = Sequence(make_request(name, prompt=range(1, prompt + 1)))
    sequence.tokens += list(range(100, 100 + generated))
    sequence.computed = computed
    sequence.add_blocks([1, 2], 8)
    return ScheduledRows(sequence, num_rows)


def test_last_row_of_a_prompt_is_no_decode_row() -> None:
    chunk = _rows("chunk", prompt=9, generated=0, computed=0, num_rows=5)
    last = _rows("last", prompt=6, generated=0, computed=5, num_rows=1)
    decode = _rows("decode", prompt=3, generated=2, computed=4, num_rows=1)

    step = pack_rows([chunk, last, decode])

    assert step.token_ids.tolist() == [[101, 6, 1, 2, 3, 4, 5]]
    assert step.positions.tolist() == [[4, 5, 0, 1, 2, 3, 4]]
    assert (step.num_single, step.num_decode, step.num_rows) == (2, 1, 7)
    assert [(span.start, span.stop) for span in step.prefill] == [(2, 7)]
    assert step.scored_rows.tolist() == [1, 0], "in the order of the rows that were scheduled"


def test_recomputing_an_answer_after_preemption_is_prefill() -> None:
    again = _rows("again", prompt=3, generated=4, computed=0, num_rows=7)

    step = pack_rows([again], buckets=(8, 16))

    assert (step.num_single, step.num_decode, step.num_rows) == (0, 0, 7)
    assert step.token_ids.shape == (1, 8)
