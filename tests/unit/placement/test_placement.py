"""The even placement covers every expert once and is even in each layer and over all."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from cluster.placement import even_placement

LAYERS = st.lists(st.integers(0, 60), unique=True, min_size=1, max_size=12).map(sorted)


@given(layers=LAYERS, num_experts=st.integers(1, 64), num_hosts=st.integers(1, 9))
def test_every_expert_has_exactly_one_owner(layers: list[int], num_experts: int, num_hosts: int) -> None:
    hosts = even_placement(layers, num_experts, num_hosts)

    assert len(hosts) == num_hosts
    owners = Counter((layer, expert) for host in hosts for layer, experts in host.items() for expert in experts)
    assert owners == Counter({(layer, expert): 1 for layer in layers for expert in range(num_experts)})
    assert all(list(experts) == sorted(experts) for host in hosts for experts in host.values())


@given(layers=LAYERS, num_experts=st.integers(1, 64), num_hosts=st.integers(1, 9))
def test_no_host_owns_two_more_than_another_in_a_layer_nor_over_all(
    layers: list[int], num_experts: int, num_hosts: int
) -> None:
    hosts = even_placement(layers, num_experts, num_hosts)

    for layer in layers:
        sizes = [len(host[layer]) for host in hosts]
        assert max(sizes) - min(sizes) <= 1
    totals = [sum(len(experts) for experts in host.values()) for host in hosts]
    assert max(totals) - min(totals) <= num_experts % num_hosts, "remainders do not pile up on one host"


@given(layers=LAYERS, num_experts=st.integers(2, 64), num_hosts=st.integers(2, 9))
def test_neighbours_are_on_different_hosts(layers: list[int], num_experts: int, num_hosts: int) -> None:
    for host in even_placement(layers, num_experts, num_hosts):
        for experts in host.values():
            assert not any(expert + 1 in experts for expert in experts)


def test_placement_depends_on_nothing_else() -> None:
    assert even_placement((1, 2), 5, 2) == even_placement([1, 2], 5, 2)
    assert even_placement((1, 2), 5, 2) == [{1: (0, 2, 4), 2: (1, 3)}, {1: (1, 3), 2: (0, 2, 4)}]
