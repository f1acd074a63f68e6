"""Hosts follow the load, one at a time, and none is ended before it is empty."""

from __future__ import annotations

from scheduler_values import LAYERS, NUM_EXPERTS, host_report, worker_report

from cluster.control.host_scaler import HostScaler
from cluster.control.roster import Roster
from cluster.placement.plan import Placement
from cluster.placement.state import first_placement
from cluster.scaling.rules import ScalingRules

RULES = ScalingRules(least=1, most=3, up_after_s=5.0, down_after_s=30.0)
EVERYTHING = {layer: tuple(range(NUM_EXPERTS)) for layer in LAYERS}


class _Case:
    """Hosts that are busy for a share of the time; the placement is what the test says."""

    def __init__(self, num_hosts: int) -> None:
        self.calls: list[tuple[str, int]] = []
        self.now_s = 0.0
        self.roster = Roster(silence_s=10.0)
        self.hosts = dict.fromkeys(range(num_hosts), 0.0)
        self.placement = first_placement(LAYERS, NUM_EXPERTS, num_hosts)
        self.scaler = HostScaler(
            RULES,
            start=lambda index, _: self.calls.append(("start", index)),
            stop=lambda index: self.calls.append(("stop", index)),
        )

    def run(self, seconds: int, *, busy: float) -> None:
        for _ in range(seconds):
            self.now_s += 1
            self.roster.note_worker(worker_report(steps=int(self.now_s)), self.now_s)
            for index in self.hosts:
                self.hosts[index] += busy
                self.roster.note_host(host_report(index, busy_s=self.hosts[index]), self.now_s)
            self.scaler.turn(self.roster, self.placement, self.now_s)


def test_more_load_starts_one_host_and_waits_for_it() -> None:
    case = _Case(1)
    case.run(60, busy=0.3)
    assert case.calls == []

    case.run(60, busy=0.95)
    assert case.calls == [("start", 1)], "it is on its way"
    case.hosts[1] = 0.0
    case.run(60, busy=0.5)

    assert case.calls == [("start", 1)]


def test_less_load_empties_a_host_before_it_is_ended() -> None:
    case = _Case(2)
    case.run(60, busy=0.01)
    assert case.scaler.leaving == {1}
    assert case.calls == []

    case.placement = Placement(epoch=2, hosts={0: EVERYTHING})
    case.run(1, busy=0.01)

    assert case.calls == [("stop", 1)]
    assert case.scaler.leaving == frozenset()


def test_a_host_that_leaves_stays_if_load_comes_back() -> None:
    case = _Case(2)
    case.run(60, busy=0.01)
    assert case.scaler.leaving == {1}

    case.run(60, busy=0.7)

    assert case.scaler.leaving == frozenset()
    assert case.calls == []


class _Nodes:
    """Hosts of a fixed number on several nodes; started hosts report at once, and placements follow as told."""

    def __init__(self, number: int, nodes: set[str], hosts: dict[int, str]) -> None:
        self.nodes, self.hosts = nodes, dict(hosts)
        self.roster = Roster(silence_s=10.0)
        self.now_s = 0.0
        self.stopped: list[int] = []
        self.scaler = HostScaler(
            ScalingRules(least=number, most=number), start=self._start, stop=self._stop, nodes=lambda: self.nodes
        )

    def run(self, seconds: int) -> None:
        for _ in range(seconds):
            self.now_s += 1
            self.roster.leaving = self.scaler.leaving
            for index, node in self.hosts.items():
                self.roster.note_host(host_report(index, node_id=node), self.now_s)
            self.roster.forget_silent(self.now_s)
            owners = [i for i, node in self.hosts.items() if i not in self.scaler.leaving and node not in self.draining]
            hosts = {i: EVERYTHING if i == owners[0] else {} for i in owners} if owners else {}
            left = {} if owners else dict.fromkeys(self.hosts, EVERYTHING)
            self.scaler.turn(self.roster, Placement(epoch=2, hosts={**hosts, **left}), self.now_s)

    @property
    def draining(self) -> frozenset[str]:
        return self.roster.draining

    def _start(self, index: int, node: str | None) -> None:
        assert node is not None and index not in self.hosts
        self.hosts[index] = node

    def _stop(self, index: int) -> None:
        self.stopped.append(index)
        self.hosts.pop(index, None)
        self.roster._hosts.pop(index, None)


def test_hosts_two_one_none_are_spread_once_a_node_joins() -> None:
    case = _Nodes(3, {"a", "b"}, {0: "a", 1: "a", 2: "b"})
    case.run(30)
    assert case.hosts == {0: "a", 1: "a", 2: "b"}, "nowhere better"

    case.nodes.add("c")
    case.run(40)

    assert sorted(case.hosts.values()) == ["a", "b", "c"]
    case.run(60)
    assert len(case.stopped) == 1, "and then all stay"


def test_a_node_that_has_all_hosts_is_emptied_into_others_and_used_again() -> None:
    case = _Nodes(2, {"a", "b", "c"}, {0: "a", 1: "a"})
    case.roster.set_draining({"a"})
    case.run(40)
    assert sorted(case.hosts.values()) == ["a", "a", "b", "c"], "others take over; these may be used again"
    assert case.stopped == []

    case.roster.set_draining(())
    case.run(80)
    assert len(case.hosts) == 2 and len(set(case.hosts.values())) == 2


def test_nothing_starts_where_it_may_not_stay() -> None:
    case = _Nodes(2, {"a"}, {0: "a", 1: "a"})
    case.roster.set_draining({"a"})
    case.run(40)

    assert case.hosts == {0: "a", 1: "a"}
