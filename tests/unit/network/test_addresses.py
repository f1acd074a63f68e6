"""IPv6 addresses are written so that they can be read, and found where everything is listened on."""

from __future__ import annotations

import pytest

from cluster.network.addresses import join_address, listens_everywhere, local_host


@pytest.mark.parametrize(
    ("host", "written"),
    [
        ("127.0.0.1", "127.0.0.1:80"),
        ("name", "name:80"),
        ("::1", "[::1]:80"),
        ("fe80::1%eth0", "[fe80::1%eth0]:80"),
        ("[::1]", "[::1]:80"),
    ],
)
def test_brackets_where_they_belong(host: str, written: str) -> None:
    assert join_address(host, 80) == written


def test_everywhere_is_found_on_loopback_of_the_same_kind() -> None:
    assert (local_host("0.0.0.0"), local_host("::"), local_host("10.0.0.1")) == ("127.0.0.1", "::1", "10.0.0.1")
    assert listens_everywhere("::") and listens_everywhere("0.0.0.0") and not listens_everywhere("::1")
