"""The engine's rules for starting and ending a sequence, with a runner that counts upwards."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from engine_builders import VOCABULARY, CountingRunner, make_engine, make_request

from actors.engine.engine import Engine, StepOutput
from cluster.errors import InvalidRequest, Overloaded
from cluster.types import FinishReason, GenerationRequest, RequestId


def _run(engine: Engine, *requests: GenerationRequest) -> dict[str, list[StepOutput]]:
    for request in requests:
        engine.add(request)
    outputs: dict[str, list[StepOutput]] = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            outputs[output.request_id].append(output)
    return outputs


def _tokens(outputs: list[StepOutput]) -> list[int]:
    return [output.token_id for output in outputs]


def test_ends_at_max_tokens() -> None:
    outputs = _run(make_engine(), make_request("a", prompt=(3, 4), max_tokens=3))["a"]

    assert _tokens(outputs) == [5, 6, 7]
    assert [output.finish_reason for output in outputs] == [None, None, FinishReason.LENGTH]


def test_ends_at_end_of_sequence_which_is_part_of_the_answer() -> None:
    outputs = _run(make_engine(eos=(6, 9)), make_request("a", prompt=(4,)))["a"]

    assert _tokens(outputs) == [5, 6]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_ignore_eos_goes_on() -> None:
    outputs = _run(make_engine(eos=(6,)), make_request("a", prompt=(4,), ignore_eos=True, max_tokens=4))["a"]

    assert _tokens(outputs) == [5, 6, 7, 8]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_stop_token_ids_end_it_even_when_eos_is_ignored() -> None:
    request = make_request("a", prompt=(4,), ignore_eos=True, stop_token_ids=(7,))

    outputs = _run(make_engine(eos=(6,)), request)["a"]

    assert _tokens(outputs) == [5, 6, 7]
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_end_tokens_are_not_chosen_before_min_tokens() -> None:
    always_end = CountingRunner(lambda tokens: 6)
    request = make_request("a", prompt=(4,), min_tokens=2, stop_token_ids=(0,))

    outputs = _run(make_engine(always_end, eos=(6,)), request)["a"]

    assert _tokens(outputs) == [1, 1, 6]  # 1 is the likeliest but 6 (end) and 0 (stop)
    assert outputs[-1].finish_reason is FinishReason.STOP


def test_ends_when_the_context_is_full() -> None:
    outputs = _run(make_engine(max_model_len=6), make_request("a", prompt=(1, 2, 3), max_tokens=50))["a"]

    assert _tokens(outputs) == [4, 5, 6]
    assert outputs[-1].finish_reason is FinishReason.LENGTH


def test_stop_wins_over_length_on_the_last_token() -> None:
    outputs = _run(make_engine(eos=(5,)), make_request("a", prompt=(4,), max_tokens=1))["a"]

    assert outputs[-1].finish_reason is FinishReason.STOP


@pytest.mark.parametrize("length", [0, 64, 65])
def test_prompt_that_cannot_be_answered_is_refused_with_both_numbers(length: int) -> None:
    engine = make_engine(max_model_len=64)

    with pytest.raises(InvalidRequest, match=rf"{length} tokens; 1 to 63"):
        engine.add(make_request("a", prompt=range(length)))

    assert not engine.has_work


def test_prompt_of_the_longest_legal_length_gives_one_token() -> None:
    outputs = _run(make_engine(max_model_len=64), make_request("a", prompt=[1] * 63))["a"]

    assert len(outputs) == 1


def test_request_id_in_use_is_refused_and_free_again_after_the_end() -> None:
    engine = make_engine()
    engine.add(make_request("a"))

    with pytest.raises(InvalidRequest, match="in use"):
        engine.add(make_request("a"))

    while engine.has_work:
        engine.step()
    assert _run(engine, make_request("a", max_tokens=1))["a"]


def test_refused_for_a_full_queue_leaves_no_trace() -> None:
    engine = make_engine(max_running=1, max_queue=0)
    engine.add(make_request("a"))

    with pytest.raises(Overloaded):
        engine.add(make_request("b"))

    assert engine.abort_all() == ["a"]
    assert engine.counters.prompt_tokens == 3


@pytest.mark.parametrize("steps", [0, 1, 2])
def test_abort_frees_the_sequence_at_any_time(steps: int) -> None:
    engine = make_engine()
    engine.add(make_request("a"))
    engine.add(make_request("b", prompt=(8, 9), max_tokens=3))
    for _ in range(steps):
        engine.step()

    engine.abort(RequestId("a"))
    rest = []
    while engine.has_work:
        rest += engine.step()

    assert {output.request_id for output in rest} == {"b"}
    assert engine.batcher.blocks.num_used == 0


def test_abort_of_an_unknown_id_is_ignored() -> None:
    make_engine().abort(RequestId("nobody"))


def test_abort_all_names_what_it_stopped() -> None:
    engine = make_engine(max_running=1)
    for name in "abc":
        engine.add(make_request(name))
    engine.step()

    assert engine.abort_all() == ["a", "b", "c"]
    assert not engine.has_work
    assert engine.step() == []
    assert engine.batcher.blocks.num_used == 0


def test_counters_count() -> None:
    engine = make_engine(block_size=4)

    _run(engine, make_request("a", prompt=range(1, 11), max_tokens=3))
    outputs = _run(engine, make_request("b", prompt=range(1, 11), max_tokens=2))["b"]

    assert engine.counters.prompt_tokens == 20
    assert engine.counters.generated_tokens == 5
    assert engine.counters.steps == 5
    assert engine.counters.cached_prompt_tokens == 8
    assert [output.num_cached for output in outputs] == [8, 8]


def test_every_step_packs_all_running_sequences() -> None:
    runner = CountingRunner()
    engine = make_engine(runner, max_batch_tokens=8)

    _run(engine, make_request("a", prompt=(1, 2), max_tokens=3), make_request("b", prompt=range(3, 12), max_tokens=1))

    assert runner.steps == [[("a", 2), ("b", 6)], [("a", 1), ("b", 3)], [("a", 1)]]


def test_tokens_are_the_same_whether_or_not_sequences_are_preempted() -> None:
    requests = [
        make_request(str(i), prompt=[(i + j) % 30 for j in range(5 + i)], max_tokens=12, ignore_eos=True)
        for i in range(6)
    ]
    plenty = _run(make_engine(), *requests)

    engine = make_engine(num_blocks=8, block_size=4, max_model_len=32)
    scarce = _run(engine, *requests)

    assert engine.batcher.num_preemptions > 0
    assert {name: _tokens(o) for name, o in scarce.items()} == {name: _tokens(o) for name, o in plenty.items()}


def test_logprobs_are_given_where_asked_for() -> None:
    outputs = _run(make_engine(), make_request("a", num_logprobs=2, max_tokens=1), make_request("b", max_tokens=1))

    logprob = outputs["a"][0].logprob
    assert logprob is not None
    assert logprob.token_id == 4
    assert len(logprob.top) == 2
    assert outputs["b"][0].logprob is None


def test_choice_and_index_key_the_noise() -> None:
    flat = CountingRunner(lambda tokens: 0)
    params = {"temperature": 50.0, "seed": 1, "max_tokens": 12, "ignore_eos": True}

    outputs = _run(
        make_engine(flat, eos=()),
        make_request("a", choice=0, **params),
        make_request("again", choice=0, **params),
        make_request("other", choice=1, **params),
    )

    assert _tokens(outputs["a"]) == _tokens(outputs["again"])
    assert _tokens(outputs["a"]) != _tokens(outputs["other"])
    assert all(0 <= token < VOCABULARY for token in _tokens(outputs["other"]))


def _favourite(tokens: Sequence[int]) -> int:
    return 9


def test_penalties_count_what_was_generated() -> None:
    """Each 9 costs the next one 2: after five its logit is 0 instead of 10, and 0 is first with 1."""
    request = make_request("a", prompt=(9, 9, 9), frequency_penalty=2.0, max_tokens=8, ignore_eos=True)

    tokens = _tokens(_run(make_engine(CountingRunner(_favourite)), request)["a"])

    assert tokens == [9, 9, 9, 9, 9, 0, 1, 2]


def test_bad_words_and_allowed_tokens_and_bias_bind_their_own_sequence_only() -> None:
    outputs = _run(
        make_engine(CountingRunner(_favourite), eos=()),
        make_request("free", max_tokens=3),
        make_request("bad", max_tokens=4, bad_words=((9, 9),)),
        make_request("allowed", max_tokens=3, allowed_token_ids=(4, 5)),
        make_request("biased", max_tokens=3, logit_bias=((7, 11.0),)),
    )

    assert _tokens(outputs["free"]) == [9, 9, 9]
    assert _tokens(outputs["bad"]) == [9, 0, 9, 0]
    assert _tokens(outputs["allowed"]) == [4, 4, 4]
    assert _tokens(outputs["biased"]) == [7, 7, 7]


def _penalised(name: str, i: int) -> GenerationRequest:
    return make_request(
        name,
        prompt=[(i + j) % 30 for j in range(5 + i)],
        max_tokens=12,
        ignore_eos=True,
        repetition_penalty=1.4,
        presence_penalty=0.8,
        temperature=1.0,
        seed=i,
        num_prompt_logprobs=2,
    )


def test_penalties_and_prompt_logprobs_are_the_same_in_chunks_and_through_preemptions() -> None:
    requests = [_penalised(str(i), i) for i in range(6)]
    plenty = _run(make_engine(), *requests)

    engine = make_engine(num_blocks=8, block_size=4, max_batch_tokens=7, max_model_len=32)
    scarce = _run(engine, *requests)

    assert engine.batcher.num_preemptions > 0
    assert {name: _tokens(o) for name, o in scarce.items()} == {name: _tokens(o) for name, o in plenty.items()}
    assert {n: o[0].prompt_logprobs for n, o in scarce.items()} == {n: o[0].prompt_logprobs for n, o in plenty.items()}


def test_prompt_logprobs_come_once_and_tell_of_every_prompt_token_but_the_first() -> None:
    engine = make_engine(max_batch_tokens=3)

    first, *rest = _run(engine, make_request("a", prompt=(4, 5, 9, 10, 3), num_prompt_logprobs=1))["a"]

    assert first.prompt_logprobs is not None
    assert [score.token_id for score in first.prompt_logprobs] == [5, 9, 10, 3]
    assert [score.rank == 1 for score in first.prompt_logprobs] == [True, False, True, False], "it counts upwards"
    assert [score.top[0][0] for score in first.prompt_logprobs] == [5, 6, 10, 11]
    assert first.token_id == 4
    assert all(output.prompt_logprobs is None for output in rest)


def test_prompt_of_one_token_has_no_logprobs_but_an_answer() -> None:
    output = _run(make_engine(), make_request("a", prompt=(4,), num_prompt_logprobs=1, max_tokens=1))["a"][0]

    assert (output.token_id, output.prompt_logprobs) == (5, ())


def test_scored_and_other_prompts_share_a_step() -> None:
    outputs = _run(
        make_engine(),
        make_request("plain", prompt=(3, 4), max_tokens=2),
        make_request("scored", prompt=(7, 8, 9), max_tokens=2, num_prompt_logprobs=0),
        make_request("other", prompt=(20,), max_tokens=2),
    )

    assert {name: _tokens(o) for name, o in outputs.items()} == {"plain": [5, 6], "scored": [10, 11], "other": [21, 22]}
    assert [o[0].prompt_logprobs is None for o in outputs.values()] == [True, False, True]


def test_a_sequence_knows_how_long_it_waited_for_its_first_rows() -> None:
    outputs = _run(make_engine(max_running=1), *(make_request(name, prompt=(3,), max_tokens=3) for name in "ab"))

    waited = {name: {output.queued_s for output in of} for name, of in outputs.items()}
    assert all(len(values) == 1 for values in waited.values()), "it is known once and stays"
    assert max(waited["b"]) > max(waited["a"]) > 0
