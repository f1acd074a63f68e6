"""When an application is gone, and whose it is."""

from __future__ import annotations

import pytest

from cluster.control.presence import WORKER_DEPLOYMENT, Ownership, Presence, ServedApplication, is_served

_OURS = frozenset({WORKER_DEPLOYMENT, "HttpIngress"})


def _served(**status_by_name: str) -> dict[str, ServedApplication]:
    return {name: ServedApplication(status, _OURS) for name, status in status_by_name.items()}


def _when_gone(*seen: bool | None, every_s: float = 2.0) -> float | None:
    """Seconds after which one that was there is called gone; `seen` at one look after the other, the last for ever."""
    presence = Presence(0.0)
    presence.note(True, 0.0)
    for turn in range(100):
        now_s = every_s * (turn + 1)
        if presence.note(seen[min(turn, len(seen) - 1)], now_s):
            return now_s
    return None


def test_it_is_gone_after_several_looks_in_a_row_over_some_seconds() -> None:
    assert _when_gone(False) == 12.0
    assert _when_gone(False, every_s=0.25) == 10.25
    assert _when_gone(False, every_s=30.0) == 150.0


def test_it_is_not_gone_while_nothing_is_known() -> None:
    assert _when_gone(None) is None
    assert _when_gone(*[False] * 4, None, True) is None
    assert _when_gone(*[False] * 4, None, False) == 22.0, "no answer begins the count anew"


def test_one_that_is_being_deployed_may_take_a_minute_to_come() -> None:
    presence = Presence(0.0)
    assert not any(presence.note(False, now_s) for now_s in range(1, 60))
    assert presence.note(False, 60.0)
    presence.note(True, 100.0)
    presence.expect(101.0)
    assert not any(presence.note(False, now_s) for now_s in range(102, 161))
    assert presence.note(False, 161.0)


@pytest.mark.parametrize(
    ("owner", "served", "others", "expected"),
    [
        ("a", _served(a="RUNNING"), (), True),
        ("a", _served(a="DEPLOY_FAILED"), (), True),
        ("a", _served(a="UNHEALTHY", b="RUNNING"), (), True),
        ("a", _served(b="RUNNING"), (), False),
        ("a", _served(a="DELETING"), (), False),
        ("a", {}, (), False),
        (None, {}, (), False),
        (None, _served(a="RUNNING"), (), True),
        (None, _served(a="RUNNING"), ("a",), False),
        (None, _served(a="RUNNING", b="DEPLOYING"), ("a",), True),
        (None, _served(a="DELETING"), (), False),
        (None, {"theirs": ServedApplication("RUNNING", frozenset({"Other"}))}, (), False),
        (None, {"coming": ServedApplication("DEPLOYING", frozenset())}, (), True),
    ],
)
def test_whether_serve_has_it(
    owner: str | None, served: dict[str, ServedApplication], others: tuple[str, ...], expected: bool
) -> None:
    assert is_served(owner, served, others) is expected


def test_the_first_application_whose_workers_say_so_has_it() -> None:
    ownership, both = Ownership("moesaic", "spec"), _served(a="RUNNING", b="DEPLOYING")
    assert ownership.claim("a", "spec", both) is None
    assert ownership.claim("a", "another after a redeployment", both) is None
    refusal = ownership.claim("b", "spec", both)
    assert refusal is not None
    assert "ray.application" in refusal and "'a'" in refusal
    assert ownership.claim("b", "spec", None) is not None, "Serve does not answer: nothing has changed"
    assert ownership.claim("b", "spec", _served(b="DEPLOYING")) is None, "a is gone"
    assert ownership.owner == "b"


def test_of_two_deployed_at_once_the_one_that_was_not_built_last_is_refused() -> None:
    ownership, both = Ownership("moesaic", "spec of b"), _served(a="DEPLOYING", b="DEPLOYING")
    assert "ray.application" in (ownership.claim("a", "spec of a", both) or "")
    assert ownership.claim("b", "spec of b", both) is None


@pytest.mark.parametrize(
    ("by", "digest", "served", "is_refused"),
    [
        (None, "spec", _served(a="RUNNING"), False),  # the same again
        (None, "other", _served(a="RUNNING"), True),  # a second one beside it
        (None, "other", _served(a="DEPLOYING"), False),  # deployed again
        (None, "other", _served(a="DELETING"), False),
        (None, "other", {}, False),
        (None, "other", None, True),
        ("a", "other", _served(a="RUNNING"), False),
        ("b", "spec", _served(a="RUNNING", b="DEPLOYING"), True),
        ("b", "other", _served(a="DEPLOYING"), True),
        ("b", "other", _served(b="DEPLOYING"), False),
    ],
)
def test_what_may_be_deployed_in_its_place(
    by: str | None, digest: str, served: dict[str, ServedApplication] | None, is_refused: bool
) -> None:
    ownership = Ownership("moesaic", "spec")
    ownership.claim("a", "spec", _served(a="RUNNING"))
    refusal = ownership.adopt(by, digest, served)
    assert (refusal is not None) is is_refused
    assert refusal is None or "ray.application" in refusal


def test_one_whose_application_is_gone_waits_for_the_next_to_say_its_name() -> None:
    ownership = Ownership("moesaic", "spec")
    ownership.claim("a", "spec", _served(a="RUNNING"))
    assert ownership.adopt(None, "spec", {}) is None
    assert ownership.owner is None
