"""What the front end does with a sequence whose worker was lost, or did not take it."""

from __future__ import annotations

import pytest
from engine_builders import make_request

from cluster.errors import (
    ConfigError,
    ExpertReadError,
    InvalidOutput,
    InvalidRequest,
    MoesaicError,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from cluster.routing.attempts import MAX_LOST_AT_ONCE, PATIENCE_S, Attempts
from cluster.types import TokenChunk

TAKEN = TokenChunk(token_ids=())
LOST = WorkerLost("lost")


def _said(*token_ids: int) -> TokenChunk:
    return TokenChunk(token_ids=token_ids)


def _attempts() -> Attempts:
    return Attempts(make_request("a", max_tokens=9), now_s=0.0)


def test_next_attempt_has_everything_that_was_said_and_an_id_of_its_own() -> None:
    attempts = _attempts()
    for chunk in (TAKEN, _said(7), _said(8, 9)):
        attempts.take(chunk)

    assert attempts.retry(LOST, now_s=5.0, avoid={"w2", "w1"}) == 0.0
    again = attempts.request
    assert (again.request_id, again.attempt) == ("a+1", 1)
    assert (again.emitted_ids, again.avoid) == ((7, 8, 9), ("w1", "w2"))
    assert (again.prompt_ids, again.sampling) == (make_request().prompt_ids, make_request(max_tokens=9).sampling)

    attempts.take(_said(10))
    attempts.retry(LOST, now_s=6.0, avoid=())
    assert (attempts.request.request_id, attempts.request.emitted_ids) == ("a+2", (7, 8, 9, 10))


@pytest.mark.parametrize(
    "error",
    [
        InvalidRequest("x"),
        ExpertReadError("x"),
        InvalidOutput("x"),
        ConfigError("x"),
        MoesaicError("x"),
        Overloaded("x"),
    ],
)
def test_errors_that_another_worker_would_give_too_pass(error: MoesaicError) -> None:
    with pytest.raises(type(error)):
        _attempts().retry(error, now_s=0.0, avoid=())


def test_what_was_begun_is_not_refused_for_load() -> None:
    attempts = _attempts()
    attempts.take(_said(1))
    attempts.retry(LOST, now_s=0.0, avoid=())

    assert attempts.retry(Overloaded("full"), now_s=0.1, avoid=()) > 0


def test_waits_grow_to_a_second_and_start_anew_after_a_token() -> None:
    attempts = _attempts()
    waits = [attempts.retry(Unavailable("starting"), now_s=0.0, avoid=()) for _ in range(8)]
    assert waits[0] == 0 and waits[1] > 0
    assert waits == sorted(waits) and waits[-1] == 1

    attempts.take(_said(1))
    assert attempts.retry(LOST, now_s=1.0, avoid=()) == 0


def test_patience_ends_when_nobody_takes_it() -> None:
    attempts = _attempts()
    attempts.retry(Unavailable("starting"), now_s=PATIENCE_S - 1, avoid=())
    with pytest.raises(Unavailable, match="60 s; the last one: starting"):
        attempts.retry(Unavailable("starting"), now_s=PATIENCE_S, avoid=())


def test_patience_counts_from_the_loss_and_not_from_the_start() -> None:
    attempts = _attempts()
    attempts.take(TAKEN)
    attempts.retry(LOST, now_s=1000.0, avoid=())
    attempts.retry(Unavailable("starting"), now_s=1000.0 + PATIENCE_S - 1, avoid=())
    with pytest.raises(Unavailable):
        attempts.retry(Unavailable("starting"), now_s=1000.0 + PATIENCE_S, avoid=())


def test_a_worker_that_takes_and_gives_up_does_not_make_a_fast_loop() -> None:
    attempts = _attempts()
    for _ in range(8):
        attempts.take(TAKEN)
        wait_s = attempts.retry(Unavailable("stopping"), now_s=0.0, avoid=())
    assert wait_s == 1


def test_a_request_that_takes_its_workers_down_is_not_given_to_a_third() -> None:
    attempts = _attempts()
    for _ in range(MAX_LOST_AT_ONCE - 1):
        attempts.take(TAKEN)
        attempts.retry(LOST, now_s=0.0, avoid=())
    attempts.take(TAKEN)
    with pytest.raises(MoesaicError, match="2 attention workers in a row") as caught:
        attempts.retry(LOST, now_s=0.0, avoid=())
    assert not isinstance(caught.value, Unavailable), "nobody should try it again"


def test_losses_with_tokens_between_them_are_bad_luck() -> None:
    attempts = _attempts()
    for token in range(8):
        attempts.take(TAKEN)
        attempts.take(_said(token))
        attempts.retry(LOST, now_s=0.0, avoid=())
    assert attempts.request.emitted_ids == tuple(range(8))
