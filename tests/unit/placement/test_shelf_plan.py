"""Shelves stand on other nodes, keep different experts, and the most used of their own."""

from __future__ import annotations

from collections import Counter

import hypothesis.strategies as st
from hypothesis import given

from cluster.placement.shelf_plan import choose_shelf_nodes, shelf_room, shelf_share
from cluster.types import ExpertId, Phase

_MEMORY = {"CPU": 4.0}
_GPU = {"CPU": 4.0, "gpu-node": 1.0}


def test_a_node_alone_lends_nothing() -> None:
    assert choose_shelf_nodes({"a": _MEMORY}, [{}]) == ()


def test_nodes_that_cannot_compute_lend_and_the_others_keep_their_memory() -> None:
    nodes = {"c": _MEMORY, "b": _GPU, "a": _MEMORY}

    assert choose_shelf_nodes(nodes, [{"gpu-node": 1.0}]) == ("a", "c")


def test_where_every_node_can_compute_each_lends_to_the_others() -> None:
    assert choose_shelf_nodes({"b": _GPU, "a": _MEMORY}, [{"gpu-node": 1.0}, {}]) == ("a", "b")
    assert choose_shelf_nodes({"b": _GPU, "a": _GPU}, [{"gpu-node": 1.0}]) == ("a", "b")


@given(
    num_layers=st.integers(1, 6),
    num_experts=st.integers(1, 16),
    num_shelves=st.integers(1, 5),
    capacity=st.integers(0, 120),
    counts=st.dictionaries(
        st.sampled_from(Phase),
        st.dictionaries(st.integers(0, 5), st.dictionaries(st.integers(0, 15), st.integers(0, 9))),
    ),
)
def test_no_expert_twice_no_shelf_too_full_and_the_most_used_of_its_own_first(
    num_layers: int, num_experts: int, num_shelves: int, capacity: int, counts: dict[Phase, dict[int, dict[int, int]]]
) -> None:
    layers = list(range(num_layers))

    def share(shelf: int, capacity: int) -> list[ExpertId]:
        return shelf_share(layers, num_experts, shelf=shelf, num_shelves=num_shelves, capacity=capacity, counts=counts)

    kept = [share(shelf, capacity) for shelf in range(num_shelves)]
    own = [share(shelf, num_layers * num_experts) for shelf in range(num_shelves)]

    everything = {ExpertId(layer, expert) for layer in layers for expert in range(num_experts)}
    assert Counter(expert for experts in own for expert in experts) == Counter(everything)
    for some, all_of_it in zip(kept, own, strict=True):
        assert some == all_of_it[:capacity]
        used = [sum(rows.get(e.layer, {}).get(e.expert, 0) for rows in counts.values()) for e in all_of_it]
        assert used == sorted(used, reverse=True)


@given(num_layers=st.integers(1, 8), num_experts=st.integers(4, 32), capacity=st.integers(1, 100))
def test_without_counts_every_layer_gets_its_part(num_layers: int, num_experts: int, capacity: int) -> None:
    kept = shelf_share(range(num_layers), num_experts, shelf=0, num_shelves=2, capacity=capacity, counts={})

    by_layer = Counter(expert.layer for expert in kept)
    if len(kept) < num_layers * (num_experts // 2):  # while no layer is exhausted
        assert max(by_layer.values()) - min(by_layer.get(layer, 0) for layer in range(num_layers)) <= 1


def test_a_shelf_stays_below_what_ray_moves_to_disk_and_takes_no_more_than_asked() -> None:
    assert shelf_room(500, 1000) == 500
    assert shelf_room(5000, 1000) == 700
    assert shelf_room(5000, 0) == 0
