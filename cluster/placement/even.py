"""Which host owns which experts while nothing is known of their use."""

from __future__ import annotations

from collections.abc import Sequence


def even_placement(layers: Sequence[int], num_experts: int, num_hosts: int) -> list[dict[int, tuple[int, ...]]]:
    """Owned experts by host and layer when nothing is known of their use: as even as possible in every layer.

    Neighbours go to different hosts, and each layer begins with another host, so that a remainder does not pile up.
    """
    return [
        {
            layer: tuple(e for e in range(num_experts) if (e + place) % num_hosts == host)
            for place, layer in enumerate(layers)
        }
        for host in range(num_hosts)
    ]
