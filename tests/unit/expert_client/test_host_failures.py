"""Hosts that are slow, fail, cannot read or were away: the answer is right, and attempts are bounded."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from dispatch_parts import hosts_owning, local_sum, work_of
from memory_hosts import NUM_EXPERTS, TOP_K, Worker

from actors.experts.backend import ExpertBackend
from cluster.errors import ExpertReadError


def test_host_that_is_slow_is_not_waited_for_and_not_lost(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS), range(NUM_EXPERTS))
    worker = make_worker(hosts)
    slow, quick = hosts
    slow.faults.append("slow")
    slow.is_slow = True
    work = work_of(4)

    first = worker.dispatcher.start(work, 4, 0)()
    second = worker.dispatcher.start(work, 4, 0)()

    for out in (first, second):
        torch.testing.assert_close(out, local_sum(everything, work, 4), rtol=1e-5, atol=1e-6)
    assert len(slow.received) == 1, "nothing more is asked of it while it owes an answer"
    assert len(quick.computed) == 3
    counters = worker.dispatcher.counters
    assert (counters.hedged, counters.redispatched, counters.fallbacks) == (1, 1, 0)
    assert (worker.links.num_lost, worker.links.is_complete) == (0, False)
    assert "host 0 is slow" in worker.links.degraded[0]

    slow.is_slow = False  # the late answer has come: it is dropped, and the host is as good as before
    torch.testing.assert_close(
        worker.dispatcher.start(work, 4, 0)(), local_sum(everything, work, 4), rtol=1e-5, atol=1e-6
    )
    assert (len(slow.received), worker.links.degraded, counters.hedged) == (2, (), 1)
    assert worker.nothing_waits()


def test_slow_host_without_replicas_is_computed_for_here_and_given_up_in_the_end(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS))
    hosts[0].faults.append("slow")
    hosts[0].is_slow = True
    worker = make_worker(hosts)
    work = work_of(4)

    assert torch.equal(worker.dispatcher.start(work, 4, 0)(), local_sum(everything, work, 4))
    assert (worker.dispatcher.counters.hedged, worker.links.num_lost) == (1, 0)
    worker.links.now_s += 10.0  # longer than a host may take for a layer
    assert torch.equal(worker.dispatcher.start(work, 4, 0)(), local_sum(everything, work, 4))

    assert worker.links.num_lost == 1
    assert worker.links.is_complete, "connected anew"


def test_host_that_fails_every_time_costs_bounded_attempts_and_no_request(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS))
    hosts[0].faults.extend(["receive"] * 100)
    worker = make_worker(hosts)
    work = work_of(4)

    assert torch.equal(worker.dispatcher.start(work, 4, 0)(), local_sum(everything, work, 4))
    assert len(hosts[0].received) == 4
    assert worker.dispatcher.counters.fallbacks == 1


def test_host_that_cannot_read_its_experts_is_not_asked_again_and_not_lost(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, range(NUM_EXPERTS))
    hosts[0].faults.extend(["failed"])
    worker = make_worker(hosts)
    work = work_of(4)

    assert torch.equal(worker.dispatcher.start(work, 4, 0)(), local_sum(everything, work, 4))
    assert len(hosts[0].received) == 1
    assert (worker.links.num_lost, worker.dispatcher.counters.fallbacks) == (0, 1)


def test_error_here_while_other_hosts_still_compute_leaves_no_answer_behind(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, [0, 1], [2, 3], [4, 5])
    hosts[0].faults.extend(["failed"])
    worker = make_worker(hosts, slots=TOP_K)
    assert worker.backend is not None
    worker.backend.error = ExpertReadError("model.safetensors: gone")

    with pytest.raises(ExpertReadError, match="gone"):
        worker.dispatcher.start(work_of(8), 8, 0)()

    assert [len(host.received) for host in hosts] == [1, 1, 1]
    assert worker.nothing_waits()


def test_room_taken_while_a_host_was_away_is_given_back(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, [0, 1, 2], [3, 4, 5])
    hosts[1].faults.extend(["send"])
    worker = make_worker(hosts, reconnects=False)
    work = work_of(5)

    worker.dispatcher.start(work, 5, 0)()
    worker.dispatcher.start(work, 5, 0)()
    assert worker.local.fallback is not None
    assert len(worker.fallbacks) == 1, "kept while the host is away"

    worker.links.reconnects = True
    worker.links.now_s += 100
    worker.links.connect_due()
    worker.dispatcher.start(work, 5, 0)()

    assert worker.local.fallback is None
    assert len(worker.fallbacks) == 1


def test_unreadable_checkpoint_is_named_and_no_answer_stays_behind(
    everything: ExpertBackend, make_worker: Callable[..., Worker]
) -> None:
    hosts = hosts_owning(everything, [0, 1, 2], [])  # nobody has 3 to 5
    worker = make_worker(hosts, slots=TOP_K)
    assert worker.backend is not None
    worker.backend.error = ExpertReadError("model.safetensors: gone")
    work = work_of(8)

    with pytest.raises(ExpertReadError, match="gone"):
        worker.dispatcher.start(work, 8, 0)()

    assert len(hosts[0].received) == 1
    assert worker.nothing_waits()
    worker.backend.error = None
    torch.testing.assert_close(worker.dispatcher.start(work, 8, 0)(), local_sum(everything, work, 8))
