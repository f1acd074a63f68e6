"""The batcher: decode first, prompts in chunks, the youngest gives way, and everybody finishes."""

from __future__ import annotations

import hypothesis.strategies as st
import pytest
from batcher_steps import add_prompt, compute_rows, take_step
from engine_builders import make_batcher, make_request
from hypothesis import given, settings

from actors.engine.batcher import Batcher, ScheduledRows
from actors.engine.sequence import Sequence, SequenceState
from cluster.errors import Overloaded


def test_prompt_is_computed_at_once_when_it_fits() -> None:
    batcher = make_batcher(max_batch_tokens=64)
    add_prompt(batcher, "a", 10)

    assert take_step(batcher) == [("a", 10)]
    assert take_step(batcher) == [("a", 1)]


def test_long_prompt_is_computed_in_chunks_and_sampled_after_the_last() -> None:
    batcher = make_batcher(max_batch_tokens=4)
    sequence = add_prompt(batcher, "a", 10)

    sizes = []
    for _ in range(3):
        (rows,) = batcher.plan()
        sizes.append((rows.num_rows, rows.samples))
        compute_rows(batcher, [rows])

    assert sizes == [(4, False), (4, False), (2, True)]
    assert sequence.num_generated == 1


def test_decoding_sequences_come_before_prompts() -> None:
    batcher = make_batcher(max_batch_tokens=4)
    add_prompt(batcher, "a", 3)
    take_step(batcher)
    add_prompt(batcher, "b", 10, start=20)

    assert take_step(batcher) == [("a", 1), ("b", 3)]
    add_prompt(batcher, "c", 2, start=40)
    assert take_step(batcher) == [("a", 1), ("b", 3)]
    assert take_step(batcher) == [("a", 1), ("b", 3)]
    assert take_step(batcher) == [("a", 1), ("b", 1), ("c", 2)]


def test_prompts_are_served_in_order_of_arrival() -> None:
    batcher = make_batcher(max_batch_tokens=8)
    for i, name in enumerate("abc"):
        add_prompt(batcher, name, 6, start=20 * i)

    assert take_step(batcher) == [("a", 6), ("b", 2)]
    assert take_step(batcher) == [("a", 1), ("b", 4), ("c", 3)]


def test_no_more_than_max_running_sequences_run() -> None:
    batcher = make_batcher(max_running=2)
    first = add_prompt(batcher, "a", 3)
    for i, name in enumerate("bc", start=1):
        add_prompt(batcher, name, 3, start=20 * i)

    assert [name for name, _ in take_step(batcher)] == ["a", "b"]
    assert (batcher.num_running, batcher.num_waiting) == (2, 1)
    batcher.finish(first)
    assert [name for name, _ in take_step(batcher)] == ["b", "c"]


def test_full_queue_refuses_with_numbers() -> None:
    batcher = make_batcher(max_running=1, max_queue=2)
    for i in range(3):
        add_prompt(batcher, str(i), 3)

    with pytest.raises(Overloaded, match="at most 2"):
        add_prompt(batcher, "one too many", 3)

    assert batcher.num_waiting == 3


def test_youngest_is_preempted_when_blocks_run_out_and_comes_back_after_somebody_finished() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4)
    old, young = add_prompt(batcher, "old", 11), add_prompt(batcher, "young", 10, start=20)

    assert take_step(batcher) == [("old", 11), ("young", 10)]
    while batcher.num_preemptions == 0:
        step = take_step(batcher)
    assert step == [("old", 1)]
    assert (young.state, young.computed, young.blocks) == (SequenceState.WAITING, 0, [])
    assert old.state is SequenceState.RUNNING
    emitted = list(young.tokens)
    batcher.finish(old)

    step = take_step(batcher)

    assert step[0][0] == "young"
    assert young.tokens[: len(emitted)] == emitted


def test_preempted_sequence_is_not_admitted_again_in_the_same_step() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4, max_batch_tokens=64)
    add_prompt(batcher, "old", 12)
    young = add_prompt(batcher, "young", 8, start=20)
    waiting = add_prompt(batcher, "tiny", 1, start=90)

    preempting: list[tuple[str, int]] = []
    while not batcher.num_preemptions:
        preempting = take_step(batcher)

    assert young.state is SequenceState.WAITING or waiting.state is SequenceState.WAITING
    assert all(name != "young" or young.state is SequenceState.RUNNING for name, _ in preempting)


def test_preempted_sequence_waits_before_those_that_never_ran() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4, max_running=2)
    old, _ = add_prompt(batcher, "old", 11), add_prompt(batcher, "young", 10, start=20)
    add_prompt(batcher, "never ran", 2, start=60)
    while not batcher.num_preemptions:
        take_step(batcher)

    batcher.finish(old)

    assert [name for name, _ in take_step(batcher)] == ["young", "never ran"]


def test_sequence_is_not_admitted_without_room_for_its_first_token() -> None:
    batcher = make_batcher(num_blocks=4, block_size=4)
    add_prompt(batcher, "a", 7)
    add_prompt(batcher, "b", 8, start=20)

    assert take_step(batcher) == [("a", 7)]
    assert batcher.num_waiting == 1


def test_shared_prefix_is_not_computed_twice() -> None:
    batcher = make_batcher(block_size=4)
    first = add_prompt(batcher, "a", 10)
    take_step(batcher)
    second = add_prompt(batcher, "b", 12)

    step = take_step(batcher)

    assert step == [("a", 1), ("b", 4)]
    assert (first.num_cached, second.num_cached) == (0, 8)
    assert first.blocks[:2] == second.blocks[:2]
    assert second.slots[:8].tolist() == first.slots[:8].tolist()


def test_what_a_preempted_sequence_finds_of_itself_is_not_reported_as_cached() -> None:
    batcher = make_batcher(num_blocks=6, block_size=4)
    old, young = add_prompt(batcher, "old", 11), add_prompt(batcher, "young", 10, start=20)
    while not batcher.num_preemptions:
        take_step(batcher)
    batcher.finish(old)

    step = take_step(batcher)

    assert step[0][1] < len(young.tokens) - 1
    assert young.num_cached == 0


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_finish_frees_everything_in_any_state(steps: int) -> None:
    batcher = make_batcher()
    sequence = add_prompt(batcher, "a", 10)
    for _ in range(steps):
        take_step(batcher)

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
        add_prompt(batcher, str(i), prompt, start=start)
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
    choices = [add_prompt(batcher, name, 10) for name in "abc"]

    assert take_step(batcher) == [("a", 6)]
    assert take_step(batcher) == [("a", 4)], "the others begin when its blocks can be found"
    assert take_step(batcher) == [("a", 1), ("b", 2), ("c", 2)]
    assert [choice.num_cached for choice in choices] == [0, 8, 8]


def test_prompts_too_short_to_share_a_block_do_not_wait() -> None:
    batcher = make_batcher(block_size=4)
    for name in "ab":
        add_prompt(batcher, name, 4)

    assert take_step(batcher) == [("a", 4), ("b", 4)]


def test_scored_prompts_are_computed_whole_and_in_bounded_chunks() -> None:
    batcher = make_batcher(block_size=4, max_batch_tokens=200)
    add_prompt(batcher, "before", 100)
    take_step(batcher)
    scored = Sequence(make_request("scored", prompt=range(100), num_prompt_logprobs=1))
    batcher.add(scored)

    steps = []
    while not scored.num_generated:
        planned = batcher.plan()
        steps += [(rows.num_rows, rows.num_logits) for rows in planned if rows.sequence is scored]
        compute_rows(batcher, planned)

    assert steps == [(64, 64), (36, 36)]
    assert scored.num_cached == 0
    assert [(rows.num_rows, rows.num_logits) for rows in batcher.plan()][1:] == [(1, 1)]
