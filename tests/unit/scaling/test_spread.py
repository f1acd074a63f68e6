"""Where expert hosts go."""

from __future__ import annotations

from cluster.scaling.spread import deal_nodes, emptiest_node, is_uneven, surplus_host, usable_nodes


def test_hosts_are_dealt_to_nodes_in_turn() -> None:
    assert deal_nodes({"b", "a", "c"}, 5) == ("a", "b", "c", "a", "b")
    assert deal_nodes((), 2) == (None, None)


def test_two_one_none_is_uneven_and_one_one_one_is_not() -> None:
    nodes = ("a", "b", "c")
    hosts = {0: "a", 1: "a", 2: "b"}

    assert is_uneven(nodes, hosts) and emptiest_node(nodes, hosts) == "c"
    assert surplus_host([0, 1, 2, 3], {**hosts, 3: "c"}) == 1
    assert not is_uneven(nodes, {0: "a", 2: "b", 3: "c"})
    assert not is_uneven(nodes, {0: "a"}), "one host is nowhere better"
    assert not is_uneven(("a",), hosts) and not is_uneven((), hosts)
    assert emptiest_node((), hosts) is None


def test_of_equal_nodes_the_last_host_leaves() -> None:
    assert surplus_host([0, 1, 2], {0: "a", 1: "b", 2: "c"}) == 2
    assert surplus_host([0, 1], {}) == 1


def test_usable_are_living_nodes_that_have_what_a_host_needs() -> None:
    nodes = [
        {"NodeID": "a", "Alive": True, "Resources": {"CPU": 2.0, "fast": 1.0}},
        {"NodeID": "b", "Alive": True, "Resources": {"CPU": 2.0}},
        {"NodeID": "c", "Alive": False, "Resources": {"fast": 1.0}},
    ]

    assert usable_nodes(nodes, {}) == {"a", "b"}
    assert usable_nodes(nodes, {"fast": 1.0}) == {"a"}
