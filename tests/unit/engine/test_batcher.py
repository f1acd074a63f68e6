"""The batcher: decode first, prompts in chunks, the youngest gives way, and everybody finishes."""

from __future__ import annotations

from dataclasses import replace

import hypothesis.strategies as st
import numpy as np
import pytest
from engine_builders import make_batcher, make_request
from hypothesis import given, settings
from knowledge_builders import embedding_of, make_knowledge

from actors.engine.batcher import Batcher, ScheduledRows
from actors.engine.sequence import Sequence, SequenceState
from cluster.errors import Overloaded
from cluster.semantics.co_batching import CoBatching


def _add(batcher: Batcher, name: str, length: int, *, start: int = 0) -> Sequence:
    sequence = Sequence(make_request(name, prompt=range(start, start + length)))
    batcher.add(sequence)
    return sequence


def _compute(batcher: Batcher, planned: list[ScheduledRows], token: int = 7) -> None:
    """What the engine does with a plan, with a token out of thin air."""
    sampling = [rows.sequence for rows in planned if rows.samples]
    for rows in planned:
        batcher.on_computed(rows)
    for sequence in sampling:
        sequence.tokens.append(token)


def _step(batcher: Batcher, token: int = 7) -> list[tuple[str, int]]:
    planned = batcher.plan()
    _compute(batcher, planned, token)
    return [(rows.sequence.request.request_id, rows.num_rows) for rows in planned]


def test_prompt_is_computed_at_once_when_it_fits() -> None:
    batcher = make_batcher(max_batch_tokens=64)
    _add(batcher, "a", 10)

    assert _step(batcher) == [("a", 10)]
    assert _step(batcher) == [("a", 1)]


def test_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    batcher = make_batcher(max_batch_tokens=4)
    sequence = _add(batcher, "a", 10)

    sizes = []
    for _ in range(3):
        (rows,) = batcher.plan()
        sizes.append((rows.num_rows, rows.samples))
        _compute(batcher, [rows])

    assert sizes == [(4, False), (4, False), (2, True)]
    assert sequence.num_generated == 1


def test_decoding_sequences_come_before_prompts() -> None:
    batcher = make_batcher(max_batch_tokens=4)
    _add(batcher, "a", 3)
    _step(batcher)
    _add(batcher, "b", 10, start=20)

    assert _step(batcher) == [("a", 1), ("b", 3)]
    _add(batcher, "c", 2, start=40)
    assert _step(batcher) == [("a", 1), ("b", 3)]
    assert _step(batcher) == [("a", 1), ("b", 3)]
    assert _step(batcher) == [("a", 1), ("b", 1), ("c", 2)]


def test_prompts_are_served_in_order_of_arrival() -> None:
    batcher = make_batcher(max_batch_tokens=8)
    for i, name in enumerate("abc"):
        _add(batcher, name, 6, start=20 * i)

    assert _step(batcher) == [("a", 6), ("b", 2)]
    assert _step(batcher) == [("a", 1), ("b", 4), ("c", 3)]


def test_no_more_than_max_running_sequences_run() -> None:
    batcher = make_batcher(max_running=2)
    first = _add(batcher, "a", 3)
    for i, name in enumerate("bc", start=1):
        _add(batcher, name, 3, start=20 * i)

    assert [name for name, _ in _step(batcher)] == ["a", "b"]
    assert (batcher.num_running, batcher.num_waiting) == (2, 1)
    batcher.finish(first)
    assert [name for name, _ in _step(batcher)] == ["b", "c"]


def test_full_queue_refuses_with_numbers() -> None:
    batcher = make_batcher(max_running=1, max_queue=2)
    for i in range(3):
        _add(batcher, str(i), 3)

    with pytest.raises(Overloaded, match="at most 2"):
        _add(batcher, "one too many", 3)

    assert batcher.num_waiting == 3


def test_youngest_is_preempted_when_blocks_run_out_and_comes_back_after_somebody_finished() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4)
    old, young = _add(batcher, "old", 11), _add(batcher, "young", 10, start=20)

    assert _step(batcher) == [("old", 11), ("young", 10)]
    while batcher.num_preemptions == 0:
        step = _step(batcher)
    assert step == [("old", 1)]
    assert (young.state, young.computed, young.blocks) == (SequenceState.WAITING, 0, [])
    assert old.state is SequenceState.RUNNING
    emitted = list(young.tokens)
    batcher.finish(old)

    step = _step(batcher)

    assert step[0][0] == "young"
    assert young.tokens[: len(emitted)] == emitted


def test_preempted_sequence_is_not_admitted_again_in_the_same_step() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4, max_batch_tokens=64)
    _add(batcher, "old", 12)
    young = _add(batcher, "young", 8, start=20)
    waiting = _add(batcher, "tiny", 1, start=90)

    preempting: list[tuple[str, int]] = []
    while not batcher.num_preemptions:
        preempting = _step(batcher)

    assert young.state is SequenceState.WAITING or waiting.state is SequenceState.WAITING
    assert all(name != "young" or young.state is SequenceState.RUNNING for name, _ in preempting)


def test_preempted_sequence_waits_before_those_that_never_ran() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4, max_running=2)
    old, _ = _add(batcher, "old", 11), _add(batcher, "young", 10, start=20)
    _add(batcher, "never ran", 2, start=60)
    while not batcher.num_preemptions:
        _step(batcher)

    batcher.finish(old)

    assert [name for name, _ in _step(batcher)] == ["young", "never ran"]


def test_sequence_is_not_admitted_without_room_for_its_first_token() -> None:
    batcher = make_batcher(num_blocks=4, block_size=4)
    _add(batcher, "a", 7)
    _add(batcher, "b", 8, start=20)

    assert _step(batcher) == [("a", 7)]
    assert batcher.num_waiting == 1


def test_shared_prefix_is_not_computed_twice() -> None:
    batcher = make_batcher(block_size=4)
    first = _add(batcher, "a", 10)
    _step(batcher)
    second = _add(batcher, "b", 12)

    step = _step(batcher)

    assert step == [("a", 1), ("b", 4)]
    assert (first.num_cached, second.num_cached) == (0, 8)
    assert first.blocks[:2] == second.blocks[:2]
    assert second.slots[:8].tolist() == first.slots[:8].tolist()


def test_what_a_preempted_sequence_finds_of_itself_is_not_reported_as_cached() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4)
    old, young = _add(batcher, "old", 11), _add(batcher, "young", 10, start=20)
    while not batcher.num_preemptions:
        _step(batcher)
    batcher.finish(old)

    step = _step(batcher)

    assert step[0][1] < len(young.tokens) - 1
    assert young.num_cached == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_finish_frees_everything_in_any_state(steps: int) -> None:
    batcher = make_batcher()
    sequence = _add(batcher, "a", 10)
    for _ in range(steps):
        _step(batcher)

    batcher.finish(sequence)

    assert batcher.is_idle
    assert batcher.blocks.num_used == 0
    assert sequence.state is SequenceState.FINISHED
    assert batcher.plan() == []


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 30), st.integers(1, 12), st.integers(0, 1)), min_size=1, max_size=12),
    max_batch_tokens=st.integers(1, 40),
    max_running=st.integers(1, 6),
    spare_blocks=st.integers(0, 6),
)
def test_every_workload_finishes_within_its_budgets(
    lengths: list[tuple[int, int, int]], max_batch_tokens: int, max_running: int, spare_blocks: int
) -> None:
    """KV holds little more than the longest sequence; prompts share prefixes; each step does something."""
    block_size = 4
    longest = max(prompt + new for prompt, new, _ in lengths)
    batcher = make_batcher(
        num_blocks=-(-longest // block_size) + spare_blocks,
        block_size=block_size,
        max_batch_tokens=max_batch_tokens,
        max_running=max_running,
    )
    wanted: dict[str, int] = {}
    for i, (prompt, new, start) in enumerate(lengths):
        _add(batcher, str(i), prompt, start=start)
        wanted[str(i)] = new
    steps = 0

    while not batcher.is_idle:
        planned = batcher.plan()
        _check_plan(batcher, planned, max_batch_tokens, max_running)
        sampling = [rows.sequence for rows in planned if rows.samples]
        for rows in planned:
            batcher.on_computed(rows)
        for sequence in sampling:
            sequence.tokens.append(5)
            if sequence.num_generated == wanted[sequence.request.request_id]:
                batcher.finish(sequence)
        steps += 1
        assert steps < 5000, "no progress"

    assert batcher.blocks.num_used == 0


def _check_plan(batcher: Batcher, planned: list[ScheduledRows], max_batch_tokens: int, max_running: int) -> None:
    assert planned, "there is work, but nobody was chosen"
    assert sum(rows.num_rows for rows in planned) <= max_batch_tokens
    assert all(rows.num_rows >= 1 for rows in planned)
    assert len({id(rows.sequence) for rows in planned}) == len(planned)
    assert batcher.num_running <= max_running
    for rows in planned:
        sequence = rows.sequence
        assert sequence.state is SequenceState.RUNNING
        assert len(sequence.slots) == len(sequence.blocks) * 4 >= sequence.computed + rows.num_rows
        written = sequence.slots[sequence.computed : sequence.computed + rows.num_rows]
        assert min(written) >= 4, "block 0 is for padding"
    writes = [int(s) for r in planned for s in r.sequence.slots[r.sequence.computed : r.sequence.computed + r.num_rows]]
    assert len(set(writes)) == len(writes), "two rows write one slot"


def test_choices_of_one_prompt_wait_for_the_first_and_share_its_blocks() -> None:
    batcher = make_batcher(block_size=4, max_batch_tokens=6)
    choices = [_add(batcher, name, 10) for name in "abc"]

    assert _step(batcher) == [("a", 6)]
    assert _step(batcher) == [("a", 4)], "the others begin when its blocks can be found"
    assert _step(batcher) == [("a", 1), ("b", 2), ("c", 2)]
    assert [choice.num_cached for choice in choices] == [0, 8, 8]


def test_prompts_too_short_to_share_a_block_do_not_wait() -> None:
    batcher = make_batcher(block_size=4)
    for name in "ab":
        _add(batcher, name, 4)

    assert _step(batcher) == [("a", 4), ("b", 4)]


def test_scored_prompts_are_computed_whole_and_in_bounded_chunks() -> None:
    batcher = make_batcher(block_size=4, max_batch_tokens=200)
    _add(batcher, "before", 100)
    _step(batcher)
    scored = Sequence(make_request("scored", prompt=range(100), num_prompt_logprobs=1))
    batcher.add(scored)

    steps = []
    while not scored.num_generated:
        planned = batcher.plan()
        steps += [(rows.num_rows, rows.num_logits) for rows in planned if rows.sequence is scored]
        _compute(batcher, planned)

    assert steps == [(64, 64), (36, 36)]
    assert scored.num_cached == 0
    assert [(rows.num_rows, rows.num_logits) for rows in batcher.plan()][1:] == [(1, 1)]


def _add_kind(batcher: Batcher, name: str, kind: int, start: int) -> Sequence:
    request = replace(make_request(name, prompt=range(start, start + 4), max_tokens=9), embedding=embedding_of(kind))
    sequence = Sequence(request)
    batcher.add(sequence)
    return sequence


def _co_batching() -> CoBatching:
    """Kind 0 uses experts 0 and 1, kind 1 uses 2 and 3."""
    uses = np.zeros((2, 1, 4))
    uses[0, 0, :2] = uses[1, 0, 2:] = 0.9
    co_batching = CoBatching(max_overtaken=2)
    co_batching.set_knowledge(make_knowledge(uses))
    return co_batching


def test_co_batching_admits_who_shares_experts_but_nobody_waits_for_ever() -> None:
    batcher = make_batcher(max_running=2)
    batcher.co_batching = _co_batching()
    first = _add_kind(batcher, "first", 0, 0)
    _step(batcher)
    other = _add_kind(batcher, "other", 1, 10)
    alike = [_add_kind(batcher, f"alike {i}", 0, 20 + 10 * i) for i in range(3)]

    joined = []
    for _ in range(4):
        _step(batcher)
        newest = batcher._running[-1]
        joined.append(newest.request.request_id)
        batcher.finish(newest)

    assert joined == ["alike 0", "alike 1", "other", "alike 2"]
    assert first.state is SequenceState.RUNNING and other.overtaken == 2 and alike[2].overtaken == 0


def test_who_was_preempted_comes_back_before_anybody_joins() -> None:
    batcher = make_batcher(num_blocks=4, block_size=4)
    batcher.co_batching = _co_batching()
    kept, put_out = _add_kind(batcher, "kept", 0, 0), _add_kind(batcher, "put out", 1, 10)
    while not batcher.num_preemptions:
        _step(batcher)
    _add_kind(batcher, "alike", 0, 20)
    batcher.finish(kept)
    _step(batcher)

    assert put_out.state is SequenceState.RUNNING


def test_without_knowledge_co_batching_is_first_come_first_served() -> None:
    batcher = make_batcher(max_running=1)
    batcher.co_batching = CoBatching()
    names = [f"{i}" for i in range(5)]
    waiting = [_add_kind(batcher, name, i % 2, 10 * i) for i, name in enumerate(names)]

    served = []
    for _ in waiting:
        ((name, _),) = _step(batcher)
        served.append(name)
        batcher.finish(next(sequence for sequence in waiting if sequence.request.request_id == name))

    assert served == names
