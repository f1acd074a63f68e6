"""Expert hosts of this process, as migrations and other hosts call them: without Ray."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from actors.expert_host.host import ExpertHost
from actors.experts.memory.shelves import RemoteReadError
from cluster.errors import MoesaicError
from cluster.placement.migration import HostCommand, HostEpochs
from cluster.types import ExpertId


class DirectHosts:
    """HostsControl and Peers over hosts by index. away: those that do not answer. damaged: what comes from them is."""

    def __init__(self) -> None:
        self.hosts: Sequence[ExpertHost] = ()
        self.away: set[int] = set()
        self.damaged: set[int] = set()
        self.fetched: list[tuple[int, ExpertId]] = []
        self.told: list[HostCommand] = []

    def indices(self) -> Sequence[int]:
        return range(len(self.hosts))

    def epochs(self, indices: Sequence[int]) -> Mapping[int, HostEpochs | None]:
        return {index: self._epochs(index) for index in indices}

    def tell(self, commands: Sequence[HostCommand]) -> Mapping[int, HostEpochs | None]:
        for command in commands:
            if command.host not in self.away:
                self.told.append(command)
                self.hosts[command.host].tell(command)
        return self.epochs([command.host for command in commands])

    def fetch(self, host: int, form: str, expert: ExpertId, timeout_s: float) -> tuple[np.ndarray, int]:
        if host in self.away:
            raise RemoteReadError(f"expert host {host} is gone")
        data, checksum = self.hosts[host].expert_bytes(form, expert)
        self.fetched.append((host, expert))
        return data, checksum

    def checksums(self, host: int, form: str, experts: Sequence[ExpertId]) -> Mapping[ExpertId, int]:
        if host in self.away:
            return {}
        found = self.hosts[host].checksums(form, experts)
        return {expert: crc + (host in self.damaged) for expert, crc in found.items()}

    def _epochs(self, index: int) -> HostEpochs | None:
        try:
            return None if index in self.away else self.hosts[index].epochs()
        except MoesaicError:
            return None
