"""Medians, memory bandwidth, one thread, the kernel's count of bytes read."""

from __future__ import annotations

import contextlib
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np


def median(values: Sequence[float]) -> float:
    """The median; 0 of nothing."""
    return statistics.median(values) if values else 0.0


@contextlib.contextmanager
def one_thread() -> Iterator[None]:
    """Both sides of a comparison compute on one thread."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def memory_bandwidth(num_bytes: int = 512 * 2**20) -> float:
    """Bytes per second at which one core reads memory: the best of several passes of the streaming kernel's own
    access pattern (eight streams, huge pages), so that it is a bound and not another program's speed."""
    from actors.kernels.native import load_native

    native = load_native()
    if native is None:
        block = np.ones(num_bytes // 8, dtype=np.int64)
        return max(num_bytes / _timed(block.sum) for _ in range(5))
    return max(native.read_bandwidth(num_bytes) for _ in range(5))


def read_bytes_of_process() -> int:
    """Bytes this process made the storage layer read, page faults included, by the kernel's count."""
    lines = dict(line.split(": ") for line in Path("/proc/self/io").read_text().splitlines())
    return int(lines["read_bytes"])


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began
