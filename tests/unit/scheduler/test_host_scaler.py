"""Hosts follow the load, one at a time, and none is ended before it is empty."""

from __future__ import annotations

from scheduler_values import LAYERS, NUM_EXPERTS, host_report, worker_report

from actors.host_scaler import HostScaler
from cluster.scheduler.placement.state import first_placement
from cluster.scheduler.plan import Placement
from cluster.scheduler.roster import Roster
from cluster.scheduler.scaling import ScalingRules

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
            start=lambda index: self.calls.append(("start", index)),
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
