"""A change of the mix of prompts: half of the domains, then the other half, of which nothing is known."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from benchmarks.routing.requests import Workload
from benchmarks.routing.runs import Cell, run_stream
from cluster.replay.fleet.worker import FleetRequest

_WINDOW = 16  # requests
_NEARLY = 1.1


def recovery(cell: Cell, work: Workload, *, seed: int) -> int:
    """Requests after the change until loads per token are within 10% of what they are in the end."""
    rng = np.random.default_rng(seed)
    domains = sorted({request.domain for request in work.measured})
    first = {domains[i] for i in rng.permutation(len(domains))[: len(domains) // 2]}
    every = [*work.past, *work.measured]
    mixed = [every[i] for i in rng.permutation(len(every))]
    before = [request for request in mixed if request.domain in first]
    after = [request for request in mixed if request.domain not in first]
    requests = run_stream(cell, work, [*before, *after, *after[:48]], until=len(before) + len(after), seed=seed)
    return recovered_after(requests[len(before) : len(before) + len(after)])


def recovered_after(requests: Sequence[FleetRequest]) -> int:
    """The first request from which on a window has at most 1.1 times the loads per token of the last third."""
    loads = np.array([request.decode_loads / request.num_tokens for request in requests])
    steady = loads[-len(loads) // 3 :].mean()
    windows = np.convolve(loads, np.full(_WINDOW, 1 / _WINDOW), mode="valid")
    return int((windows <= _NEARLY * steady).argmax())
