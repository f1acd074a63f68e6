"""Every replica is in the order: ranked ones, then unknown ones, then those that a request avoids."""

from __future__ import annotations

import numpy as np
from scheduler_values import bits, generation, knowledge, worker_report

from cluster.routing.worker_choice import WorkerChoice
from cluster.status.reports import RoutingView
from cluster.types import Tier

LOWER, UPPER = bits(0, 1, 4, 5), bits(2, 3, 6, 7)
FIRST, SECOND = (np.array(vector, dtype=np.int8).tobytes() for vector in ((127, 0), (0, 127)))


def _view(*, version: int | None = 1, **open_: int) -> RoutingView:
    """w0 has the experts of the first kind of prompt, w1 those of the second."""
    workers = tuple(
        (worker_report(f"w{i}", resident=resident, miss_s={Tier.DISK: 0.02}, num_running=open_.get(f"w{i}", 0)), 0.0)
        for i, resident in enumerate((LOWER, UPPER))
    )
    return RoutingView(workers=workers, knowledge=None if version is None else knowledge(version))


def _firsts(choice: WorkerChoice, embedding: bytes, ids: list[str]) -> list[str]:
    return [choice.order(ids, generation(embedding=embedding))[0] for _ in range(20)]


def test_kinds_of_prompt_go_where_their_experts_are() -> None:
    choice, ids = WorkerChoice("semantic", block_size=16, seed=0), ["replica-w0", "replica-w1"]
    choice.update(_view(), 0.0)

    assert _firsts(choice, FIRST, ids).count("replica-w0") >= 18  # now and then load alone decides
    assert _firsts(choice, SECOND, ids).count("replica-w1") >= 18


def test_knowledge_is_kept_where_a_view_leaves_it_out_or_has_no_workers() -> None:
    choice, ids = WorkerChoice("semantic", block_size=16, seed=0), ["replica-w0", "replica-w1"]
    choice.update(_view(version=3), 0.0)
    choice.update(_view(version=None), 1.0)
    choice.update(RoutingView(workers=(), knowledge=None), 2.0)

    assert choice.known_version == 3
    assert _firsts(choice, FIRST, ids).count("replica-w0") >= 18


def test_unknown_replicas_come_after_known_ones_and_avoided_ones_last() -> None:
    choice = WorkerChoice("semantic", block_size=16, seed=0)
    choice.update(_view(), 0.0)
    request = generation(embedding=FIRST, avoid=("replica-w0",))

    order = choice.order(["new", "replica-w0", "replica-w1"], request)

    assert order == ["replica-w1", "new", "replica-w0"]


def test_newcomers_get_their_share_before_they_report() -> None:
    choice, ids = WorkerChoice("semantic", block_size=16, seed=0), ["new", "replica-w0", "replica-w1"]
    choice.set_replicas(ids)
    choice.update(_view(w0=2, w1=2), 0.0)

    firsts: list[str] = []
    for _ in range(6):
        first = choice.order(ids, generation(embedding=FIRST))[0]
        choice.note_sent(first, generation(), 0.0)
        firsts.append(first)

    assert firsts[:2] == ["new", "new"], "as long as it has fewer than who would be taken else"
    assert 0 < firsts[2:].count("new") < 4


def test_newcomers_are_asked_before_full_workers_and_these_all_the_same() -> None:
    choice, ids = WorkerChoice("semantic", block_size=16, seed=0), ["replica-w0", "replica-w1", "new"]
    choice.update(_view(w0=8, w1=8), 0.0)

    order = choice.order(ids, generation(embedding=FIRST))

    assert order[0] == "new"
    assert set(order[1:]) == {"replica-w0", "replica-w1"}


def test_without_any_view_replicas_take_turns() -> None:
    choice, ids = WorkerChoice("semantic", block_size=16, seed=0), ["a", "b", "c"]
    choice.set_replicas(ids)
    counts = dict.fromkeys(ids, 0)
    for _ in range(30):
        first = choice.order(ids, generation())[0]
        choice.note_sent(first, generation(), 0.0)
        counts[first] += 1
    assert counts == {"a": 10, "b": 10, "c": 10}

    choice.set_replicas([*ids, "d"])
    for _ in range(4):
        first = choice.order([*ids, "d"], generation())[0]
        choice.note_sent(first, generation(), 0.0)
        counts[first] = counts.get(first, 0) + 1

    assert counts == {"a": 11, "b": 11, "c": 11, "d": 1}, "a newcomer does not get everything"


def test_other_calls_go_anywhere() -> None:
    choice, ids = WorkerChoice("semantic", block_size=16, seed=0), ["a", "b", "c"]

    firsts = {choice.order(ids, None)[0] for _ in range(50)}

    assert firsts == set(ids)
    assert choice.order(["only"], generation()) == ["only"]
