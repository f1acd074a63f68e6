"""The way from one placement of experts on hosts to another in memory that is tight. Pure.

A host holds an epoch and the next one at the same time, so what it gains in a stage has to fit beside what it has.
What has to leave first goes to its new owner first, if need be to any host with room, or a replica makes room for a
while: every expert that a live host owns is owned in every stage.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from cluster.placement.plan import Placement
from cluster.types import ExpertId


def stages(
    current: Placement, target: Placement, capacities: Mapping[int, int], *, live: Sequence[int]
) -> tuple[Placement, ...]:
    """Placements on the way to `target`, the last of which is `target` or as near as memory allows; epochs are 0.

    A host that owns more than it holds is a cache: its room is what it owns.

    Args: capacities: experts that a host holds; one not named holds what it is given. live: hosts whose experts count.
    """
    hosts = sorted({*current.hosts, *target.hosts})
    goal = {host: experts_of(target, host) for host in hosts}
    owned = {host: experts_of(current, host) if host in live else set[ExpertId]() for host in hosts}
    room = {host: max(capacities.get(host, 0), len(owned[host]), len(goal[host])) for host in hosts}
    for host in set(hosts) - set(capacities):
        room[host] = len(owned[host] | goal[host])
    been = [owned]
    while owned != goal:
        ways = (_gained(owned, goal, room), _parked(owned, goal, room), _dropped(owned, goal))
        following = next((way for way in ways if way not in been), None)
        if following is None:  # no room anywhere: experts would have to trade places
            break
        owned = following
        been.append(owned)
    nearest = min(range(len(been)), key=lambda i: sum(len(goal[host] ^ been[i][host]) for host in hosts))
    return tuple(
        _placement({host: experts for host, experts in owned.items() if experts or host in target.hosts})
        for owned in been[1 : nearest + 1]
    )


def experts_of(placement: Placement, host: int) -> set[ExpertId]:
    """What a host owns."""
    return {ExpertId(layer, expert) for layer, ids in placement.hosts.get(host, {}).items() for expert in ids}


_Owned = dict[int, set[ExpertId]]


def _gained(owned: _Owned, goal: _Owned, room: Mapping[int, int]) -> _Owned:
    """Every host gets of its goal what there is room for; what is not its goal goes once it is elsewhere."""
    held = set[ExpertId]().union(*owned.values())
    leaving = {expert for host, experts in owned.items() for expert in experts - goal[host]}
    following: _Owned = {}
    for host, experts in owned.items():
        # First what nobody has, then what makes room elsewhere by coming here.
        missing = sorted(goal[host] - experts, key=lambda expert: (expert in held, expert not in leaving, expert))
        following[host] = experts | set(missing[: room[host] - len(experts)])
    settled = {expert for host, experts in following.items() for expert in experts & goal[host]}
    kept = set[ExpertId]()
    for host, experts in following.items():
        others = experts - goal[host]
        experts -= {expert for expert in others if expert in settled or expert in kept}
        kept |= experts - goal[host]
    return following


def _parked(owned: _Owned, goal: _Owned, room: Mapping[int, int]) -> _Owned:
    """Hosts that are full of what others are to have give one expert each to a host that has room."""
    following = {host: set(experts) for host, experts in owned.items()}
    free = {host: room[host] - len(experts) for host, experts in owned.items()}
    for host, experts in owned.items():
        place = max(free, key=lambda each: (free[each], -each))
        if free[place] > 0 and free[host] == 0 and goal[host] - experts and experts - goal[host]:
            expert = min(experts - goal[host])
            following[host].discard(expert)
            following[place].add(expert)
            free[place] -= 1
    return following


def _dropped(owned: _Owned, goal: _Owned) -> _Owned:
    """A host that lacks something lets go of one expert that another host has, too; it comes back at the end."""
    for host, experts in owned.items():
        elsewhere = set[ExpertId]().union(*(theirs for other, theirs in owned.items() if other != host))
        if goal[host] - experts and experts & elsewhere:
            return {**owned, host: experts - {min(experts & elsewhere)}}
    return owned


def _placement(owned: Mapping[int, set[ExpertId]]) -> Placement:
    hosts: dict[int, dict[int, tuple[int, ...]]] = {}
    for host, experts in owned.items():
        layers: dict[int, list[int]] = {}
        for layer, expert in sorted(experts):
            layers.setdefault(layer, []).append(expert)
        hosts[host] = {layer: tuple(ids) for layer, ids in layers.items()}
    return Placement(epoch=0, hosts=hosts)
