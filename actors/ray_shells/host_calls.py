"""Calls to expert hosts by their number, from any process of the cluster: bounded in time, several hosts at once.

What migrations and other hosts ask of a host. Light to import: the scheduler has no torch.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from actors.experts.memory.shelves import RemoteReadError
from actors.ray_shells.named_actors import ActorKind, DetachedActors
from cluster.application import ApplicationId
from cluster.placement.migration import HostCommand, HostEpochs
from cluster.types import ExpertId

if TYPE_CHECKING:
    import numpy as np

_CALL_TIMEOUT_S = 3.0


def expert_hosts(application: ApplicationId) -> DetachedActors:
    """The hosts of an application; their keys are their numbers."""
    return DetachedActors(application, ActorKind.HOST)


def find_host(application: ApplicationId, index: int) -> ActorHandle:
    """Host `index`.

    Raises:
        ValueError: there is none.
    """
    return expert_hosts(application).find(str(index))


def host_indices(application: ApplicationId) -> tuple[int, ...]:
    """Hosts that there are, also those that are starting or being restarted."""
    return tuple(sorted(int(key) for key in expert_hosts(application).list_keys()))


class RayHosts:
    """The hosts of a cluster, as migrations call them (HostsControl); from plain threads."""

    def __init__(self, application: ApplicationId) -> None:
        self._application = application

    def indices(self) -> Sequence[int]:
        return host_indices(self._application)

    def epochs(self, indices: Sequence[int]) -> Mapping[int, HostEpochs | None]:
        return self._answers([(index, "epochs", ()) for index in indices])

    def tell(self, commands: Sequence[HostCommand]) -> Mapping[int, HostEpochs | None]:
        return self._answers([(command.host, "tell", (command,)) for command in commands])

    def _answers(self, calls: Sequence[tuple[int, str, tuple[object, ...]]]) -> dict[int, HostEpochs | None]:
        answers: dict[int, HostEpochs | None] = dict.fromkeys((index for index, _, _ in calls), None)
        pending: dict[ray.ObjectRef, int] = {}
        for index, method, args in calls:
            try:
                host = find_host(self._application, index)
            except ValueError:  # there is none
                continue
            pending[getattr(host, method).remote(*args)] = index
        if pending:
            for call in ray.wait(list(pending), num_returns=len(pending), timeout=_CALL_TIMEOUT_S)[0]:
                try:
                    answers[pending[call]] = ray.get(call)
                except RayError:  # it is gone, or still loads
                    continue
        return answers


class RayPeers:
    """The other hosts of a cluster, as a host takes experts from them (Peers); bytes go through the object store."""

    def __init__(self, application: ApplicationId) -> None:
        self._application = application

    def fetch(self, host: int, form: str, expert: ExpertId, timeout_s: float) -> tuple[np.ndarray, int]:
        try:
            call = self._actor(host).expert_bytes.remote(form, expert)
            answer: Any = ray.get(call, timeout=timeout_s)
        except (ValueError, RayError) as error:
            reason = f"expert host {host} did not give expert {expert}: {type(error).__name__}"
            raise RemoteReadError(f"{reason} (deadline {timeout_s:g} s)") from error
        return answer

    def checksums(self, host: int, form: str, experts: Sequence[ExpertId]) -> Mapping[ExpertId, int]:
        try:
            answer: Any = ray.get(self._actor(host).checksums.remote(form, list(experts)), timeout=_CALL_TIMEOUT_S)
        except (ValueError, RayError):
            return {}
        return answer

    def _actor(self, host: int) -> ActorHandle:
        return find_host(self._application, host)
