"""Experts on hosts give what experts here give, whoever owns what and whatever fails; no row is computed twice."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

import hypothesis.strategies as st
import numpy as np
import torch
from dispatch_parts import hosts_owning, local_sum, work_of
from expert_builders import HIDDEN, ExpertFile
from hypothesis import given, settings
from memory_hosts import FAULTS, LAYER, NUM_EXPERTS, TOP_K, Host, Worker

from actors.experts.backend import ExpertBackend
from actors.experts.compute import ExpertCompute
from actors.gates.work import ExpertWork
from cluster.placement.plan import Placement


@settings(max_examples=40, deadline=None)
@given(
    owned=st.lists(st.sets(st.integers(0, NUM_EXPERTS - 1)), min_size=1, max_size=4),
    faults=st.lists(st.lists(st.sampled_from(FAULTS), max_size=6), min_size=4, max_size=4),
    slots=st.sampled_from([0, TOP_K, NUM_EXPERTS]),
    resident=st.lists(st.integers(0, NUM_EXPERTS - 1), unique=True),
    reconnects=st.booleans(),
    num_rows=st.integers(1, 7),
    padding=st.integers(0, 2),
    seed=st.integers(0, 99),
)
def test_any_placement_memory_and_failure_give_the_local_result(
    experts: ExpertFile,
    compute: ExpertCompute,
    everything: ExpertBackend,
    owned: list[set[int]],
    faults: list[list[str]],
    slots: int,
    resident: list[int],
    reconnects: bool,
    num_rows: int,
    padding: int,
    seed: int,
) -> None:
    hosts = [Host(i, experts_, everything, deque(faults[i])) for i, experts_ in enumerate(owned)]
    worker = Worker(experts, compute, hosts, slots=slots, resident=resident, reconnects=reconnects)
    for turn in range(3):
        work = work_of(num_rows, padding=padding, seed=seed + turn)
        before = worker.choices()

        fetch = worker.dispatcher.start(work, num_rows, 0)
        first_round = [(host, frame) for host in hosts for frame in host.received]
        out = fetch()

        torch.testing.assert_close(out, local_sum(everything, work, num_rows), rtol=1e-5, atol=1e-6)
        assert out.shape == work.hidden_TD.shape
        assert worker.choices() == sorted([*before, *work.topk_ids_TK[:num_rows].flatten().tolist()])
        assert worker.nothing_waits()
        for host in hosts:
            sent = [frame for to, frame in first_round if to is host]
            assert len(sent) <= 1, "a host gets the rows of a layer in one frame"
            for frame in sent:
                assert len(np.unique(frame.rows, axis=0)) == len(frame.rows), "a row goes once to a host"
                asked = set(frame.expert_ids.flatten().tolist()) - {NUM_EXPERTS}
                assert asked
                assert asked <= host.owned
                assert not frame.weights[frame.expert_ids == NUM_EXPERTS].any()
                assert (frame.expert_ids != NUM_EXPERTS).any(1).all(), "no row without work"
            assert sum(len(h.received) for h in hosts) <= 4 * len(hosts) * len(hosts)
            host.received.clear()
    worker.dispatcher.close()


def test_one_owner_gives_the_local_result_to_the_bit(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    worker = make_worker(hosts_owning(everything, range(NUM_EXPERTS)))
    work = work_of(9, padding=2)

    assert torch.equal(worker.dispatcher.start(work, 9, 0)(), local_sum(everything, work, 9))
    assert worker.dispatcher.counters.frames == 1


def test_replicas_are_asked_before_the_checkpoint(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS), range(NUM_EXPERTS))
    hosts[0].faults.extend(["receive"])
    worker = make_worker(hosts, reconnects=False)
    work = work_of(4)

    out = worker.dispatcher.start(work, 4, 0)()

    torch.testing.assert_close(out, local_sum(everything, work, 4), rtol=1e-5, atol=1e-6)
    assert (len(hosts[0].computed), len(hosts[1].computed)) == (0, 2), "its own part, and that of the other"
    counters = worker.dispatcher.counters
    assert (counters.redispatched, counters.fallbacks, worker.links.num_lost) == (1, 0, 1)


def test_placement_is_followed_host_by_host_and_back_to_a_host_that_is_behind(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, [0, 1, 2], [3, 4, 5])
    worker = make_worker(hosts)
    hosts[1].epoch = 2  # the other one has just been started anew
    work = work_of(8)

    worker.links.set_placement(Placement(epoch=2, hosts={0: {LAYER: (3, 4, 5)}, 1: {LAYER: (0, 1, 2)}}))
    out = worker.dispatcher.start(work, 8, 0)()

    torch.testing.assert_close(out, local_sum(everything, work, 8), rtol=1e-5, atol=1e-6)
    assert worker.links.epoch == 2
    assert [frame.epoch for frame in hosts[0].received] == [2, 1], "asked again at the epoch that it is at"
    assert [frame.epoch for frame in hosts[1].received] == [2]
    asked = {host.index: set(host.computed[-1].expert_ids.flatten().tolist()) - {NUM_EXPERTS} for host in hosts}
    assert asked[0] <= {3, 4, 5} and asked[1] <= {0, 1, 2}, "by the placement, not by what they said at first"
    assert (worker.links.num_lost, worker.dispatcher.counters.fallbacks) == (0, 0)


def test_hosts_join_and_leave_with_the_placement(everything: ExpertBackend, make_worker: Callable[..., Worker]) -> None:
    hosts = hosts_owning(everything, [0, 1, 2], [3, 4, 5], [])
    worker = make_worker(hosts[:2])
    worker.links.hosts = hosts
    work = work_of(8)

    worker.links.set_placement(Placement(epoch=2, hosts={0: {LAYER: (0, 1, 2)}, 2: {LAYER: (3, 4, 5)}}))
    before = worker.dispatcher.start(work, 8, 0)()
    assert [len(host.received) for host in hosts] == [1, 1, 0], "until the newcomer is connected, those before it"
    assert (worker.links.epoch, worker.links.degraded) == (0, ())
    hosts[0].epoch = hosts[2].epoch = 2
    worker.links.connect_due()
    after = worker.dispatcher.start(work, 8, 0)()

    for out in (before, after):
        torch.testing.assert_close(out, local_sum(everything, work, 8), rtol=1e-5, atol=1e-6)
    assert [len(host.received) for host in hosts] == [2, 1, 1]
    assert (worker.links.is_complete, worker.links.num_lost, worker.links.carriers) == (True, 0, ("memory",) * 2)
    assert (worker.links.epoch, worker.dispatcher.counters.fallbacks) == (2, 0), "nothing was read in a host's place"


def test_step_of_padding_alone_asks_nobody(everything: ExpertBackend, make_worker: Callable[..., Worker]) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS))
    worker = make_worker(hosts)

    out = worker.dispatcher.start(work_of(3), 0, 0)()

    assert out.shape == (3, HIDDEN)
    assert not out.any()
    assert hosts[0].received == []


def test_new_plan_is_asked_again_and_nobody_is_lost(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS))
    worker = make_worker(hosts)
    hosts[0].epoch = 7
    work = work_of(4)

    assert torch.equal(worker.dispatcher.start(work, 4, 0)(), local_sum(everything, work, 4))
    assert [frame.epoch for frame in hosts[0].received] == [1, 7]
    assert (worker.links.num_lost, worker.dispatcher.counters.fallbacks) == (0, 0)


def test_micro_batches_may_be_under_way_together(everything: ExpertBackend, make_worker: Callable[..., Worker]) -> None:
    worker = make_worker(hosts_owning(everything, [0, 2, 4], [1, 3, 5]))
    works = [work_of(3, seed=1), work_of(5, seed=2), work_of(2, seed=3)]

    fetches = [worker.dispatcher.start(work, len(work.hidden_TD), 0) for work in works]

    for i in (1, 2, 0):
        expected = local_sum(everything, works[i], len(works[i].hidden_TD))
        torch.testing.assert_close(fetches[i](), expected, rtol=1e-5, atol=1e-6)


def test_most_used_experts_come_here_and_are_not_sent_away_any_more(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS))
    worker = make_worker(hosts, slots=TOP_K)
    assert worker.backend is not None
    x = torch.randn(4, HIDDEN, generator=torch.Generator().manual_seed(0))
    ids = torch.tensor([[0, 1, 2]] * 4)
    work = ExpertWork(LAYER, x, ids, torch.full((4, 3), 1 / 3))
    for _ in range(6):
        worker.dispatcher.start(work, 4, 4)()
        assert worker.backend.store.wait_idle(10)
    hosts[0].received.clear()

    torch.testing.assert_close(worker.dispatcher.start(work, 4, 4)(), local_sum(everything, work, 4))

    assert hosts[0].received == []
    assert np.flatnonzero(worker.backend.store.resident(LAYER)).tolist() == [0, 1, 2]
