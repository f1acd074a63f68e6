"""Who computes what, as one worker knows it at one moment: a snapshot that is replaced as a whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from actors.data_plane.channel import ExpertChannel
from cluster.execution.host_times import HostTimes
from cluster.execution.replica_choice import NOBODY, LayerReplicas, ReplicaCosts


@dataclass(frozen=True, slots=True, eq=False)
class Routes:
    """Live channels in the order of their hosts, and by layer which of them lead to owners of each expert.

    epochs: of the frames to each channel. times: of each one's host. is_whole: there is one channel, and it leads to
    all experts. has_replicas: some expert has several owners.
    """

    channels: tuple[ExpertChannel, ...]
    epochs: tuple[int, ...]
    times: tuple[HostTimes, ...]
    replicas: Mapping[int, LayerReplicas]
    is_whole: bool
    has_replicas: bool

    @classmethod
    def of(
        cls,
        hosts: Sequence[tuple[ExpertChannel, int, HostTimes, Mapping[int, tuple[int, ...]]]],
        layers: Sequence[int],
        num_experts: int,
    ) -> Routes:
        """Args: hosts: channel, epoch, times and owned experts by layer of each."""
        replicas = {
            layer: LayerReplicas.of([host[3].get(layer, ()) for host in hosts], num_experts) for layer in layers
        }
        return cls(
            channels=tuple(host[0] for host in hosts),
            epochs=tuple(host[1] for host in hosts),
            times=tuple(host[2] for host in hosts),
            replicas=replicas,
            is_whole=len(hosts) == 1 and all((each.sole[:-1] == 0).all() for each in replicas.values()),
            has_replicas=any(each.replicated for each in replicas.values()),
        )

    @property
    def owner(self) -> dict[int, np.ndarray]:
        """By layer: for each expert the position of the channel to its first owner, or -1."""
        return {layer: each.sole[:-1] for layer, each in self.replicas.items()}

    def costs(self) -> ReplicaCosts:
        """What hosts take, as measured by now."""
        expert_s, row_s, link_row_s = zip(*(each.estimate() for each in self.times), strict=True)
        return ReplicaCosts.measured(expert_s, row_s, link_row_s)

    def have_others(self, layer: int, experts: np.ndarray, position: int) -> bool:
        """Whether each of these experts has an owner besides the channel at `position`."""
        replicas = self.replicas[layer]
        owners = dict(replicas.replicated)
        return all(
            expert in owners or int(replicas.sole[expert]) not in (position, NOBODY) for expert in experts.tolist()
        )
