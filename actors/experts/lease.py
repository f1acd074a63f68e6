"""This process's lease of its node's memory, as experts and KV cache need it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from cluster.config.load import MoesaicConfig
from cluster.model.info import ModelInfo
from cluster.node_memory.leases import MemoryLease


def open_lease(config: MoesaicConfig, info: ModelInfo, num_nodes: int) -> MemoryLease:
    """This process's lease of the node's memory. Args: num_nodes: that the model's processes spread over."""
    family = f"{config.ray.application_id.key_prefix} {info.fingerprint}"
    return MemoryLease(family, expected=-(-(config.attention.workers + config.experts.hosts) // num_nodes))


@contextlib.contextmanager
def closed_on_error(lease: MemoryLease) -> Iterator[None]:
    """Nothing stays promised by a process that could not start."""
    try:
        yield
    except BaseException:
        lease.close()
        raise
