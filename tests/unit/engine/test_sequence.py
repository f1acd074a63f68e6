"""A sequence knows what is computed, where it lies, and what is left."""

from __future__ import annotations

from engine_builders import make_request

from actors.engine.sequence import Sequence, SequenceState


def test_starts_waiting_with_its_prompt() -> None:
    sequence = Sequence(make_request(prompt=(4, 5, 6)))

    assert sequence.tokens == [4, 5, 6]
    assert (sequence.state, sequence.num_generated, sequence.num_pending) == (SequenceState.WAITING, 0, 3)


def test_slots_follow_the_blocks_in_order() -> None:
    sequence = Sequence(make_request())

    sequence.add_blocks([3], 4)
    sequence.add_blocks([1, 7], 4)

    assert sequence.blocks == [3, 1, 7]
    assert sequence.slots.tolist() == [12, 13, 14, 15, 4, 5, 6, 7, 28, 29, 30, 31]


def test_reset_keeps_tokens_and_forgets_the_rest() -> None:
    sequence = Sequence(make_request(prompt=(4, 5, 6)))
    sequence.add_blocks([3], 4)
    sequence.tokens.append(9)
    sequence.computed, sequence.published, sequence.state = 3, (4, 123), SequenceState.RUNNING

    sequence.reset()

    assert sequence.tokens == [4, 5, 6, 9]
    assert (sequence.computed, sequence.blocks, len(sequence.slots), sequence.published) == (0, [], 0, (0, b""))
    assert (sequence.num_generated, sequence.num_pending) == (1, 4)
    assert sequence.state is SequenceState.WAITING


def test_sequences_with_equal_requests_are_different_sequences() -> None:
    assert Sequence(make_request()) != Sequence(make_request())


def test_end_tokens_and_stops_are_banned_until_min_tokens() -> None:
    sequence = Sequence(make_request(prompt=(4, 5), min_tokens=1, stop_token_ids=(8,)))

    assert sequence.banned((0, 2)) == (0, 2, 8)
    sequence.append(6)
    assert sequence.banned((0, 2)) == ()


def test_a_bad_word_may_not_be_completed_by_generated_tokens() -> None:
    sequence = Sequence(make_request(prompt=(6, 7), bad_words=((9,), (7, 3), (7, 8, 1))))

    assert sequence.banned(()) == (9,), "the prompt's own tokens begin no bad word"
    sequence.append(7)
    assert sequence.banned(()) == (9, 3)
    sequence.append(8)
    assert sequence.banned(()) == (9, 1)


def test_counts_go_on_through_a_preemption() -> None:
    sequence = Sequence(make_request(prompt=(6, 7), repetition_penalty=1.2))
    sequence.append(7)
    sequence.reset()
    sequence.append(8)

    assert sequence.counts is not None
    assert sequence.counts.ids.tolist() == [6, 7, 8]
    assert sequence.counts.generated.tolist() == [0, 1, 1]


def test_sequences_without_penalties_count_nothing() -> None:
    assert Sequence(make_request(temperature=1.0, top_k=3, min_tokens=2)).counts is None
