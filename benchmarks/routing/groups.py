"""The bound of benchmark `routing`: every domain belongs to one worker, whatever waits there.

Which domains belong together is searched for with what their requests are known to use: groups of equal size, domains
exchanged as long as that lowers the loads that the groups are expected to make (an expert is resident as
cluster/semantics/request_mix.py says).
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from cluster.routing.router import RouterState, RoutingRequest
from cluster.semantics.request_mix import RequestMix

_STARTS = 6


class FixedGroups(RouterState):
    """A router that is told the domain of every prompt: the place of the largest number of its embedding."""

    def __init__(self, worker_of: Sequence[int]) -> None:
        """Args: worker_of: by domain."""
        super().__init__("least-loaded", np.random.default_rng(0))
        self._worker_of = tuple(worker_of)

    def rank(self, request: RoutingRequest) -> list[str]:
        """The one worker."""
        domain = int(np.frombuffer(request.embedding, dtype=np.int8).argmax())
        return [f"worker-{self._worker_of[domain]}"]


def group_domains(uses_DN: np.ndarray, num_groups: int, num_slots: int) -> list[int]:
    """The group of each domain. Args: uses_DN: chance that a token of a domain uses an expert."""
    best: tuple[float, list[list[int]]] | None = None
    for seed in range(_STARTS):
        order = np.random.default_rng(seed).permutation(len(uses_DN))
        groups = [group.tolist() for group in np.array_split(order, num_groups)]
        found = _exchanged(uses_DN, groups, num_slots)
        if best is None or found[0] < best[0]:
            best = found
    assert best is not None
    group_of = {domain: number for number, group in enumerate(best[1]) for domain in group}
    return [group_of[domain] for domain in range(len(uses_DN))]


def _exchanged(uses_DN: np.ndarray, groups: list[list[int]], num_slots: int) -> tuple[float, list[list[int]]]:
    """Exchange two domains of two groups as long as that is better; the loads of all and the groups."""
    costs = [_loads(uses_DN[group], num_slots) for group in groups]
    is_better = True
    while is_better:
        is_better = False
        for a, b in combinations(range(len(groups)), 2):
            for i in range(len(groups[a])):
                for j in range(len(groups[b])):
                    one, other = groups[a].copy(), groups[b].copy()
                    one[i], other[j] = other[j], one[i]
                    new = _loads(uses_DN[one], num_slots), _loads(uses_DN[other], num_slots)
                    if sum(new) < costs[a] + costs[b] - 1e-9:
                        groups[a], groups[b] = one, other
                        costs[a], costs[b] = new
                        is_better = True
    return sum(costs), groups


def _loads(uses_GN: np.ndarray, num_slots: int) -> float:
    """Expected of one token of each domain of a group."""
    mean_N = uses_GN.mean(axis=0)
    resident_N = RequestMix(mean_N).residency(num_slots)
    assert resident_N is not None
    return float(mean_N @ (1 - resident_N)) * len(uses_GN)
