"""What goes wrong with one sequence of a step ends that one: the others' answers are those of a run without it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from engine_builders import CountingRunner, make_engine, make_request
from torch import Tensor

from actors.engine import engine as engine_module
from actors.engine.batcher import ScheduledRows
from actors.engine.engine import Engine
from actors.engine.step import StepFailed
from cluster.errors import ExpertReadError, InvalidOutput, InvalidRequest, MoesaicError, Unavailable, codes_of
from cluster.types import GenerationRequest, RequestId

NAMES = "abcdefg"
BAD = "d"

Answers = dict[str, list[int] | MoesaicError]


class Faulty(CountingRunner):
    """`fault` is raised whenever one of `bad` is in a step, as a kernel would: without a name."""

    def __init__(self, fault: Exception, bad: str = BAD, *, from_step: int = 0) -> None:
        super().__init__()
        self.fault, self.bad, self.from_step = fault, bad, from_step
        self.num_forwards = 0

    def execute(self, rows: Sequence[ScheduledRows]) -> Tensor:
        self.num_forwards += 1
        names = [each.sequence.request.request_id for each in rows]
        if self.num_forwards > self.from_step and any(name in self.bad for name in names):
            raise self.fault
        return super().execute(rows)


class Unsound(CountingRunner):
    """The logits of `bad` have `value` for one token that is not the likeliest."""

    def __init__(self, value: float, bad: str = BAD, *, choose: Callable[[Sequence[int]], int] | None = None) -> None:
        super().__init__(*([choose] if choose else []))
        self.value, self.bad = value, bad

    def execute(self, rows: Sequence[ScheduledRows]) -> Tensor:
        logits = super().execute(rows)
        start = 0
        for each in rows:
            if each.sequence.request.request_id in self.bad:
                logits[start : start + each.num_logits, 31] = self.value
            start += each.num_logits
        return logits


def _requests(**sampling: Any) -> list[GenerationRequest]:
    return [
        make_request(name, prompt=range(3 + i, 7 + 2 * i), max_tokens=6, seed=i, ignore_eos=True, **sampling)
        for i, name in enumerate(NAMES)
    ]


def _run(engine: Engine, requests: Sequence[GenerationRequest]) -> Answers:
    for request in requests:
        engine.add(request)
    answers: Answers = {request.request_id: [] for request in requests}
    while engine.has_work:
        for output in engine.step():
            answer = answers[output.request_id]
            assert isinstance(answer, list), "an answer after an error"
            if output.error is not None:
                answers[output.request_id] = output.error
            else:
                answer.append(output.token_id)
    assert engine.batcher.blocks.num_used == 0
    return answers


SAMPLING: list[dict[str, Any]] = [
    {},
    {"temperature": 5.0, "frequency_penalty": 0.5, "num_logprobs": 2},
    {"temperature": 3.0, "top_p": 0.9, "top_k": 7, "num_prompt_logprobs": 1},
]


def _assert_only_bad_fails(answers: Answers, truth: Answers, bad: str = BAD) -> dict[str, MoesaicError]:
    failed = {name: answer for name, answer in answers.items() if isinstance(answer, MoesaicError)}
    assert sorted(failed) == sorted(bad)
    assert {n: a for n, a in answers.items() if n not in failed} == {n: a for n, a in truth.items() if n not in failed}
    return failed


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("from_step", [0, 3])
@pytest.mark.parametrize("bad", ["a", "d", "bg"])
def test_a_forward_that_fails_ends_the_sequence_that_makes_it_fail(
    sampling: dict[str, Any], from_step: int, bad: str
) -> None:
    truth = _run(make_engine(), _requests(**sampling))
    engine = make_engine(Faulty(RuntimeError("shape mismatch"), bad, from_step=from_step))

    failed = _assert_only_bad_fails(_run(engine, _requests(**sampling)), truth, bad)

    assert all("shape mismatch" in error.message for error in failed.values())
    assert not any(codes_of(error).retryable for error in failed.values()), "it would fail elsewhere, too"


@pytest.mark.parametrize(
    "fault",
    [
        OSError(5, "Input/output error"),
        MemoryError(),
        RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        TimeoutError("no answer"),
        Unavailable("expert host 1 is gone"),
        StepFailed({RequestId("nobody"): ExpertReadError("x")}),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_what_the_machine_does_is_nobodys_fault_and_can_be_tried_again(fault: Exception) -> None:
    runner = Faulty(fault, NAMES)
    answers = _run(make_engine(runner), _requests())

    assert runner.num_forwards == 1, "nobody is looked for"
    assert all(isinstance(answer, Unavailable) for answer in answers.values())


def test_a_failure_of_everybody_alone_is_nobodys_fault() -> None:
    answers = _run(make_engine(Faulty(RuntimeError("the kernels are broken"), NAMES)), _requests())

    assert all(isinstance(answer, Unavailable) and "kernels are broken" in str(answer) for answer in answers.values())


def test_a_sequence_that_is_named_ends_and_the_others_go_on_in_the_same_step() -> None:
    runner = Faulty(StepFailed({RequestId(BAD): ExpertReadError("shard 7")}))
    truth = _run(make_engine(), _requests())
    engine = make_engine(runner)
    for request in _requests():
        engine.add(request)

    outputs = engine.step()

    assert {output.request_id for output in outputs} == set(NAMES), "nobody waits for the next step"
    answers: Answers = {o.request_id: o.error or [o.token_id] for o in outputs}
    for name, answer in answers.items():
        if name == BAD:
            assert isinstance(answer, ExpertReadError)
        else:
            tokens = truth[name]
            assert isinstance(tokens, list)
            assert answer == tokens[:1]


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize("what", ["sample", "score_tokens"])
def test_sampling_or_scoring_that_fails_ends_its_own_sequence(
    monkeypatch: pytest.MonkeyPatch, sampling: dict[str, Any], what: str
) -> None:
    """Whatever part of it fails; here for the one sequence whose prompt ends with 12."""
    truth = _run(make_engine(), _requests(**sampling))
    real = getattr(engine_module, what)
    if what == "score_tokens" and "num_prompt_logprobs" not in sampling:
        return

    def broken(logits: Tensor, params: Any, *rest: Any) -> Any:
        if what == "sample" and any(p.seed == NAMES.index(BAD) for p in params):
            raise IndexError("index 7 is out of bounds")
        if what == "score_tokens" and 12 in list(params):
            raise IndexError("index 7 is out of bounds")
        return real(logits, params, *rest)

    monkeypatch.setattr(engine_module, what, broken)
    answers = _run(make_engine(), _requests(**sampling))

    bad = BAD if what == "sample" else "".join(n for n, a in answers.items() if isinstance(a, MoesaicError))
    assert 0 < len(bad) < len(NAMES)
    failed = _assert_only_bad_fails(answers, truth, bad)
    assert all("index 7" in error.message for error in failed.values())


@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("sampling", [*SAMPLING, {"allowed_token_ids": (4, 5)}, {"num_logprobs": 0}])
def test_logits_that_are_not_finite_are_an_error_and_no_token(sampling: dict[str, Any], value: float) -> None:
    truth = _run(make_engine(), _requests(**sampling))

    answers = _run(make_engine(Unsound(value)), _requests(**sampling))

    failed = _assert_only_bad_fails(answers, truth)
    assert isinstance(failed[BAD], InvalidOutput)
    assert codes_of(failed[BAD]).http == 422
    assert failed[BAD].code == "invalid_output"


def test_a_token_that_may_not_come_is_no_fault() -> None:
    """-inf is how models say never."""
    truth = _run(make_engine(), _requests(temperature=5.0))

    answers = _run(make_engine(Unsound(-math.inf)), _requests(temperature=5.0))

    _assert_only_bad_fails(answers, truth | {BAD: answers[BAD]}, "")


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_parameters_that_leave_no_token_are_an_error_and_no_token(temperature: float) -> None:
    request = make_request("x", temperature=temperature, allowed_token_ids=(7,), bad_words=((7,),))

    answers = _run(make_engine(), [*_requests()[:2], request])

    assert isinstance(answers["x"], InvalidRequest)
    assert isinstance(answers["a"], list) and isinstance(answers["b"], list)


@pytest.mark.parametrize(
    ("runner", "cached"),
    [(Unsound(math.nan, bad="x"), 0), (Faulty(RuntimeError("a bug"), bad="x", from_step=1), 8)],
    ids=["not finite", "a bug"],
)
def test_pages_of_a_sequence_that_is_not_finite_are_found_by_nobody(runner: CountingRunner, cached: int) -> None:
    """What they hold cannot be trusted, also what was computed before it showed; other failures leave them."""
    prompt = [1 + i % 20 for i in range(12)]
    engine = make_engine(runner, block_size=4, max_batch_tokens=8)
    (answer,) = _run(engine, [make_request("x", prompt=prompt)]).values()
    assert isinstance(answer, MoesaicError)

    _run(engine, [make_request("again", prompt=prompt, max_tokens=1)])

    assert engine.counters.cached_prompt_tokens == cached
