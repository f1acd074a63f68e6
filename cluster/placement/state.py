"""A placement as bytes, for whoever must remember it. Pure."""

from __future__ import annotations

from typing import Any, cast

import orjson

from cluster.placement.even import even_placement
from cluster.placement.plan import Placement


def placement_to_bytes(placement: Placement) -> bytes:
    """JSON; `placement_from_bytes` makes the same placement of it."""
    return orjson.dumps({"epoch": placement.epoch, "hosts": placement.hosts}, option=orjson.OPT_NON_STR_KEYS)


def placement_from_bytes(blob: bytes) -> Placement:
    """Raises: ValueError, KeyError, TypeError or AttributeError for anything but what `placement_to_bytes` gave."""
    found = cast("dict[str, Any]", orjson.loads(blob))
    return Placement(
        epoch=int(found["epoch"]),
        hosts={
            int(host): {int(layer): tuple(map(int, experts)) for layer, experts in layers.items()}
            for host, layers in found["hosts"].items()
        },
    )


def first_placement(layers: tuple[int, ...], num_experts: int, num_hosts: int, *, epoch: int = 1) -> Placement:
    """What hosts own that nobody has told otherwise."""
    shares = even_placement(layers, num_experts, num_hosts)
    return Placement(epoch=epoch, hosts=dict(enumerate(shares)))
