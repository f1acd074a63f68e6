"""Experts from the memory of another expert host: the link that takes them while hosts get new experts.

Knows who offers what, bytes and their checksums; knows no Ray (actors/ray_shells/host_actor.py). Losing a peer costs
time only: whoever wanted one of its experts reads it from disk.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Protocol

import numpy as np

from actors.experts.memory.arena import RamArena
from actors.experts.memory.shelves import RemoteReadError, form_digest
from cluster.types import ExpertId, Tier

if TYPE_CHECKING:
    from actors.weights.slots import SlotForm

_TIMEOUT_S = 5.0


class Peers(Protocol):
    """Other expert hosts, by index. Called from several threads."""

    def fetch(self, host: int, form: str, expert: ExpertId, timeout_s: float) -> tuple[np.ndarray, int]:
        """An expert's bytes [slot_bytes] uint8 and their CRC-32.

        Args: form: `form_digest` of the bytes that are expected.
        Raises:
            RemoteReadError: it does not have the expert in this form, or does not answer in time.
        """
        ...

    def checksums(self, host: int, form: str, experts: Sequence[ExpertId]) -> Mapping[ExpertId, int]:
        """CRC-32 of those that it has in memory in this form; nothing of a host that does not answer."""
        ...


class PeerLink:
    """Experts that other hosts offer now; `offered` names who, by flat index. An expert is one chunk."""

    tier = Tier.REMOTE

    def __init__(self, peers: Peers, form: SlotForm, arena: RamArena) -> None:
        self.offered: dict[int, int] = {}  # replaced, never changed: `has` reads it without a lock
        self._peers, self._form, self._arena = peers, form, arena
        self._digest = form_digest(form)

    def has(self, index: int) -> bool:
        return index in self.offered

    def num_chunks(self, index: int) -> int:
        return 1

    def copy_chunk(self, index: int, chunk: int, slot: int) -> int:
        host = self.offered.get(index)
        if host is None:
            raise RemoteReadError(f"no other host offers expert {index} of the model any more")
        data, checksum = self._peers.fetch(host, self._digest, self._form.expert(index), _TIMEOUT_S)
        target = self._arena.view(slot)
        np.copyto(np.frombuffer(target, dtype=np.uint8), data)  # without the interpreter lock
        if zlib.crc32(target) != checksum:
            raise RemoteReadError(f"expert {index} of the model came damaged from expert host {host}")
        return data.nbytes

    def checksums(self, host: int, indices: Sequence[int]) -> dict[int, int]:
        """CRC-32 of those of these experts that a host has in memory."""
        experts = {self._form.expert(index): index for index in indices}
        return {
            experts[expert]: crc for expert, crc in self._peers.checksums(host, self._digest, list(experts)).items()
        }

    def close(self) -> None:
        self.offered = {}


def peer_source(peers: Peers, made: Callable[[PeerLink], None]) -> Callable[[SlotForm, RamArena], PeerLink]:
    """Makes the link into an arena. Args: made: told of it; who prepares placements says what is offered."""

    def make(form: SlotForm, arena: RamArena) -> PeerLink:
        link = PeerLink(peers, form, arena)
        made(link)
        return link

    return make
