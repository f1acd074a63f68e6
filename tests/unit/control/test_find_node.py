"""Which node a person means by an id, an address or a name."""

from __future__ import annotations

import pytest

from cluster.control.nodes import find_node
from cluster.errors import InvalidRequest

NODES = [
    {"NodeID": "0123456789abcdef", "NodeManagerAddress": "10.0.0.7", "NodeManagerHostname": "seven", "Alive": True},
    {"NodeID": "0123ffffffffffff", "NodeManagerAddress": "10.0.0.8", "NodeManagerHostname": "eight", "Alive": True},
    {"NodeID": "dddddddddddddddd", "NodeManagerAddress": "10.0.0.9", "NodeManagerHostname": "nine", "Alive": False},
]


@pytest.mark.parametrize("name", ["0123456789abcdef", "01234", "10.0.0.7", "seven"])
def test_a_node_goes_by_id_address_and_name(name: str) -> None:
    assert find_node(name, NODES) == "0123456789abcdef"


@pytest.mark.parametrize("name", ["0123", "012", "nine", "dddd", ""])
def test_what_is_not_one_living_node_is_refused_with_those_there_are(name: str) -> None:
    with pytest.raises(InvalidRequest, match=r"there are 0123456789ab \(10.0.0.7\), 0123ffffffff \(10.0.0.8\)"):
        find_node(name, NODES)


def test_a_dead_node_can_still_be_meant_where_it_is_known() -> None:
    assert find_node("dddd", NODES, known=["dddddddddddddddd"]) == "dddddddddddddddd"
