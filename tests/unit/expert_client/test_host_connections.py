"""Connections to hosts: made, lost, tried again less and less often; routes are always whole snapshots."""

from __future__ import annotations

import threading
import time

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from actors.data_plane.channel import HostEndpoint, Welcome
from actors.expert_client.host_connections import HostConnections, Routes
from cluster.errors import ConfigError, MoesaicError, Unavailable
from cluster.placement.plan import Placement

LAYERS, NUM_EXPERTS = (0, 4), 6


class Channel:
    """A connection that only knows whether it was closed."""

    carrier = "memory"

    def __init__(self, welcome: Welcome) -> None:
        self.welcome = welcome
        self.closed = False

    def close(self) -> None:
        self.closed = True


class Cluster:
    """Hosts that are there or not, and links to them without a thread, at a time that the test sets."""

    def __init__(self, *owned: set[int], num_hosts: int | None = None) -> None:
        """Args: num_hosts: that there are at first; default: all."""
        self.owned = owned
        self.errors: dict[int, Exception] = {}
        self.epoch = 1
        self.num_experts = NUM_EXPERTS
        self.layers = LAYERS
        self.now_s = 1000.0
        self.attempts: list[tuple[int, float]] = []
        self.made: list[Channel] = []
        self.links = HostConnections(
            len(owned) if num_hosts is None else num_hosts,
            self._locate,
            self._connect,  # type: ignore[arg-type]
            layers=LAYERS,
            num_experts=NUM_EXPERTS,
            clock=lambda: self.now_s,
        )

    def _locate(self, index: int) -> HostEndpoint:
        self.attempts.append((index, self.now_s))
        if index in self.errors:
            raise self.errors[index]
        return HostEndpoint(host_id=str(index), socket_name="", grpc_address="", secret="")

    def _connect(self, endpoint: HostEndpoint) -> Channel:
        experts = tuple(sorted(self.owned[int(endpoint.host_id)]))
        self.made.append(
            Channel(
                Welcome(
                    host_id=endpoint.host_id,
                    epoch=self.epoch,
                    num_experts=self.num_experts,
                    owned=dict.fromkeys(self.layers, experts),
                )
            )
        )
        return self.made[-1]

    def advance(self, seconds: float) -> None:
        """Let time pass as the thread would: attempts happen when they are due."""
        end_s = self.now_s + seconds
        while (wait_s := self.links.connect_due()) is not None and self.now_s + wait_s <= end_s:
            self.now_s += wait_s
        self.now_s = end_s

    def check_routes(self) -> Routes:
        routes = self.links.routes
        assert set(routes.owner) == set(LAYERS)
        for owner in routes.owner.values():
            assert owner.shape == (NUM_EXPERTS,)
            for expert, index in enumerate(owner.tolist()):
                owners = [i for i, channel in enumerate(routes.channels) if expert in channel.welcome.owned[0]]
                assert index == (owners[0] if owners else -1)
        alone = len(routes.channels) == 1 and len(routes.channels[0].welcome.owned[0]) == NUM_EXPERTS
        assert routes.is_whole is alone
        assert not any(channel.closed for channel in routes.channels)  # type: ignore[attr-defined]
        return routes


def _halves(epoch: int, *, second: int) -> Placement:
    """Host 0 keeps its half; the other is that of host `second`."""
    return Placement(epoch=epoch, hosts={0: dict.fromkeys(LAYERS, (0, 1, 2)), second: dict.fromkeys(LAYERS, (3, 4, 5))})


def test_routes_lead_each_expert_to_its_first_owner() -> None:
    cluster = Cluster({0, 1, 2}, {2, 3}, set())
    assert cluster.links.routes.channels == ()

    assert cluster.links.connect_due() is None

    routes = cluster.check_routes()
    assert len(routes.channels) == 3
    assert routes.owner[4].tolist() == [0, 0, 0, 1, -1, -1]
    assert cluster.links.is_complete
    assert (cluster.links.carriers, cluster.links.degraded) == (("memory",) * 3, ())


def test_lost_host_leaves_the_routes_at_once_and_comes_back() -> None:
    cluster = Cluster({0, 1, 2}, {3, 4, 5})
    cluster.links.connect_due()
    before = cluster.links.routes

    cluster.links.lose(before.channels[0], "no answer in time")

    assert cluster.made[0].closed
    assert cluster.check_routes().owner[0].tolist() == [-1, -1, -1, 0, 0, 0]
    assert before.owner[0].tolist() == [0, 0, 0, 1, 1, 1], "a snapshot stays as it was"
    assert cluster.links.carriers == ("away", "memory")
    (line,) = cluster.links.degraded
    assert "expert host 0 is away (no answer in time)" in line
    assert "checkpoint" in line
    cluster.advance(0.1)
    assert cluster.check_routes().owner[0].tolist() == [0, 0, 0, 1, 1, 1]
    assert cluster.links.degraded == ()


def test_losing_a_channel_twice_counts_once() -> None:
    cluster = Cluster({0}, {1})
    cluster.links.connect_due()
    channel = cluster.links.routes.channels[0]

    cluster.links.lose(channel, "first")
    cluster.advance(1)
    cluster.links.lose(channel, "second")

    assert cluster.links.num_lost == 1
    assert cluster.links.is_complete


def test_host_that_is_away_is_tried_less_and_less_often_and_named() -> None:
    cluster = Cluster({0}, {1})
    cluster.errors[1] = ConnectionRefusedError("nobody listens")

    cluster.advance(60)

    times = [at_s for index, at_s in cluster.attempts if index == 1]
    gaps = np.diff(times)
    assert (gaps[1:] >= gaps[:-1] - 1e-9).all()
    assert gaps[0] < 0.2
    assert gaps[-1] == pytest.approx(2.0)
    assert len([index for index, _ in cluster.attempts if index == 0]) == 1
    assert "nobody listens" in cluster.links.degraded[0]
    del cluster.errors[1]
    cluster.advance(2.1)
    assert cluster.links.is_complete


def test_host_that_is_lost_again_and_again_is_left_alone_for_a_while() -> None:
    cluster = Cluster(set(range(NUM_EXPERTS)))
    cluster.links.connect_due()
    for _ in range(200):
        if cluster.links.is_complete:
            cluster.links.lose(cluster.links.routes.channels[0], "failed")
        cluster.advance(0.05)

    assert cluster.links.num_lost < 15, "ten seconds of losing it at once"
    cluster.advance(3)
    assert cluster.links.is_complete
    cluster.advance(10)  # it lasts now
    cluster.links.lose(cluster.links.routes.channels[0], "once more")
    cluster.advance(0)
    assert cluster.links.is_complete, "tried at once"


def test_new_plan_is_taken_at_once_however_often_the_host_was_lost() -> None:
    cluster = Cluster({0, 1, 2, 3, 4}, {5})
    cluster.links.connect_due()
    for _ in range(5):
        cluster.links.lose(cluster.links.routes.channels[0], "flaps")
        cluster.advance(3)
    lost = cluster.links.num_lost
    cluster.epoch = 2

    assert not cluster.links.renew(cluster.links.routes.channels[0], 0.0), "it did not come within no time"
    assert cluster.links.routes.owner[0].tolist() == [-1] * 5 + [0]
    cluster.links.connect_due()

    assert cluster.check_routes().channels[0].welcome.epoch == 2
    assert cluster.links.num_lost == lost, "nobody was lost"
    assert cluster.links.renew(cluster.made[0], 0.0), "that one was renewed already"


def test_renew_waits_for_the_thread_that_connects() -> None:
    cluster = Cluster(set(range(NUM_EXPERTS)))
    cluster.links.start(10)
    try:
        cluster.epoch = 2
        assert cluster.links.renew(cluster.links.routes.channels[0], 10)
        assert cluster.links.routes.channels[0].welcome.epoch == 2
    finally:
        cluster.links.close()


def test_placement_waits_for_its_newcomers_a_bounded_time() -> None:
    cluster = Cluster({0, 1, 2}, {3, 4, 5}, {3, 4, 5}, {3, 4, 5}, num_hosts=2)
    cluster.links.connect_due()
    cluster.errors[2] = ConnectionRefusedError("nobody listens")

    cluster.links.set_placement(_halves(2, second=2))
    cluster.advance(2.9)
    assert (cluster.links.epoch, cluster.links.degraded) == (0, ())
    assert cluster.links.routes.owner[0].tolist() == [0, 0, 0, 1, 1, 1]

    cluster.advance(0.2)
    assert cluster.links.epoch == 2
    assert cluster.links.routes.owner[0].tolist() == [0, 0, 0, -1, -1, -1]
    assert "nobody listens" in cluster.links.degraded[0]

    cluster.links.set_placement(_halves(3, second=1))  # it left the links, and is a newcomer again
    assert cluster.links.epoch == 2
    cluster.links.set_placement(_halves(4, second=3))  # nobody waits for it any more
    cluster.links.set_placement(_halves(3, second=1))  # told late
    cluster.links.connect_due()
    assert (cluster.links.epoch, cluster.links.carriers) == (4, ("memory", "memory"))
    cluster.links.review(1.0)
    assert sum(not channel.closed for channel in cluster.made) == 2, "of those that were on the way none is left open"


def test_placement_without_newcomers_is_followed_at_once() -> None:
    cluster = Cluster({0, 1, 2}, {3, 4, 5})
    cluster.links.connect_due()
    cluster.links.lose(cluster.links.routes.channels[1], "lost")

    cluster.links.set_placement(_halves(2, second=1))

    assert cluster.links.epoch == 2, "a host that is away would not come sooner"


@pytest.mark.parametrize("error", [OSError("x"), MoesaicError("x"), ValueError("x"), KeyError("x"), AssertionError()])
def test_nothing_that_a_host_does_ends_the_attempts(error: Exception) -> None:
    cluster = Cluster({0})
    cluster.errors[0] = error
    cluster.advance(1)
    assert cluster.links.degraded

    del cluster.errors[0]
    cluster.advance(3)

    assert cluster.links.is_complete


def test_host_of_another_shape_is_never_routed_to() -> None:
    for change in ({"num_experts": 7}, {"layers": (0, 5)}):
        cluster = Cluster({0})
        vars(cluster).update(change)
        cluster.advance(1)
        assert cluster.links.routes.channels == ()
        assert all(channel.closed for channel in cluster.made)
        assert "experts a layer" in cluster.links.degraded[0]
    cluster = Cluster({NUM_EXPERTS})
    cluster.advance(1)
    assert cluster.links.routes.channels == ()


def test_start_returns_when_all_are_there_and_close_ends_everything() -> None:
    cluster = Cluster({0, 1, 2}, {3, 4, 5})
    before = threading.active_count()

    cluster.links.start(10)
    assert cluster.links.is_complete
    cluster.links.close()

    assert all(channel.closed for channel in cluster.made)
    assert threading.active_count() == before


def test_host_that_cannot_start_ends_the_start_with_its_reason() -> None:
    cluster = Cluster({0}, {1})
    cluster.errors[1] = ConfigError("config field experts.host_cache: too small")
    began = time.monotonic()

    with pytest.raises(ConfigError, match="host_cache"):
        cluster.links.start(60)

    assert time.monotonic() - began < 10
    assert all(channel.closed for channel in cluster.made), "nothing stays connected"


def test_start_in_vain_names_the_first_missing_host_and_why() -> None:
    cluster = Cluster({0}, {1}, {2})
    cluster.errors.update({1: Unavailable("expert host 1 is loading"), 2: OSError("no")})

    with pytest.raises(Unavailable, match=r"expert host 1 after 0 s: expert host 1 is loading"):
        cluster.links.start(0.2)

    assert all(channel.closed for channel in cluster.made)


@settings(max_examples=40, deadline=None)
@given(
    owned=st.lists(st.sets(st.integers(0, NUM_EXPERTS - 1)), min_size=1, max_size=4),
    events=st.lists(st.tuples(st.sampled_from(["lose", "renew", "away", "back", "wait"]), st.integers(0, 3))),
)
def test_routes_are_consistent_after_anything(owned: list[set[int]], events: list[tuple[str, int]]) -> None:
    cluster = Cluster(*owned)
    cluster.links.connect_due()
    for event, index in events:
        channels = cluster.links.routes.channels
        if event == "away":
            cluster.errors[index] = OSError("gone")
        elif event == "back":
            cluster.errors.pop(index, None)
        elif event == "wait":
            cluster.advance(0.5)
        elif channels:
            channel = channels[index % len(channels)]
            if event == "lose":
                cluster.links.lose(channel, "event")
            else:
                cluster.links.renew(channel, 0.0)
        routes = cluster.check_routes()
        carriers = cluster.links.carriers
        assert len(routes.channels) == len(carriers) - carriers.count("away")
        assert len(cluster.links.degraded) == carriers.count("away")
    cluster.errors.clear()
    cluster.advance(5)
    assert cluster.links.is_complete
    assert sum(not channel.closed for channel in cluster.made) == len(owned)
