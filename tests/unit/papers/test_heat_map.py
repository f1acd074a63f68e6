"""The picture at the top of README shows what the gates of a trace chose."""

from __future__ import annotations

from dataclasses import replace

from papers import script
from trace_builders import trace_of


def test_each_domain_has_its_own_counts_relative_to_their_mean() -> None:
    layer = 1
    trace = trace_of([[[[3], [0]], [[3], [0]]], [[[3], [1]], [[3], [2]]]], num_experts=4)
    first, second = trace.requests
    trace = replace(trace, requests=(replace(first, domain="german"), replace(second, domain="python")))

    found = script("draw_heat_map").shares(trace, layer)

    assert {domain: list(times) for domain, times in found.items()} == {"german": [4, 0, 0, 0], "python": [0, 2, 2, 0]}
