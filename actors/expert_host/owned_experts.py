"""What a host owns, epoch after epoch: it has these experts in memory, and gets new ones beside them while it serves.

A thread of its own fetches, below the demands of the batches, no faster than it may; what it fetched is compared with
the bytes of a host that had it. Knows epochs, experts and one memory; knows no frames and no scheduler.
"""

from __future__ import annotations

import threading
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from actors.experts.memory.peer import PeerLink
from actors.experts.memory.store import ExpertStore
from cluster.errors import ExpertReadError, MoesaicError
from cluster.periodic import Pace, PeriodicLoop
from cluster.placement.migration import HostCommand, HostEpochs
from cluster.types import Tier

_CHUNK, _CHUNK_BYTES = 4, 8 * 2**20  # fetched, verified and paid for together: so many experts, or so many bytes
_CHUNK_TIMEOUT_S = 60.0
_CLOSE_TIMEOUT_S = 10.0
_EXPLORE = 16  # chunks after which the dearer source is tried again
_OWNED, _COMING = 2.0, 1.0  # priorities: what is owned is fetched first, and never given up for what comes

Owned = Mapping[int, tuple[int, ...]]


@dataclass(slots=True, eq=False)
class _Preparation:
    """An epoch that is being fetched. `missing`: flat indices still to come."""

    command: HostCommand
    missing: list[int]
    moved_bytes: int = 0
    is_done: bool = False
    problem: str | None = None
    given_up: threading.Event = field(default_factory=threading.Event)


class OwnedExperts:
    """The epochs of one host. Calls return at once; `epochs` says how far it is."""

    def __init__(
        self,
        host_id: str,
        store: ExpertStore,
        owned: Owned,
        *,
        peers: PeerLink | None,
        on_epochs: Callable[[int, tuple[int, ...]], None],
    ) -> None:
        """Args: owned: of epoch 1. peers: the way from other hosts into this memory. on_epochs: told of the published
        epoch, and of those whose frames are to be taken, when they change."""
        self.owned = owned  # of the published epoch
        self.epoch = 1
        self.taken: tuple[int, ...] = (1,)
        self._host_id, self._store, self._peers, self._on_epochs = host_id, store, peers, on_epochs
        self._before: Owned = {}  # of the epoch before, while its frames are taken
        self._preparation: _Preparation | None = None
        self._num_chunks = 0
        self._lock = threading.Lock()
        self._loop = PeriodicLoop(self._prepare, Pace("owned-experts", interval_s=None), first_s=None)

    def start(self) -> None:
        """Begin to fetch what is owned."""
        with self._lock:
            self._keep()
        self._loop.start()

    def close(self) -> None:
        """Fetch nothing more; before the memory is closed."""
        self._give_up()
        self._loop.stop(_CLOSE_TIMEOUT_S)

    def epochs(self) -> HostEpochs:
        """How far this host is."""
        with self._lock:
            preparation = self._preparation
            return HostEpochs(
                host_id=self._host_id,
                published=self.epoch,
                taken=self.taken,
                preparing=preparation.command.epoch if preparation else 0,
                num_missing=(len(preparation.missing) or int(not preparation.is_done)) if preparation else 0,
                moved_bytes=preparation.moved_bytes if preparation else 0,
                problem=preparation.problem if preparation else None,
            )

    def prepare(self, command: HostCommand) -> None:
        """Fetch what an epoch adds; its frames are taken once that is done. One that failed is tried again."""
        with self._lock:
            now = self._preparation
            if command.epoch in self.taken and (now is None or now.command.epoch != command.epoch):
                return
            is_same = now is not None and (now.command.epoch, now.command.owned) == (command.epoch, command.owned)
            if is_same and now is not None and now.problem is None:
                return
            self._give_up()
            missing = self._store.protected.absent(self._indices(command.owned))
            self._preparation = _Preparation(command, missing)
        self._loop.soon()

    def publish(self, epoch: int) -> None:
        """What was prepared is what this host owns, and says it owns."""
        with self._lock:
            preparation = self._preparation
            if preparation is None or preparation.command.epoch != epoch or not preparation.is_done:
                return
            self._before, self.owned, self.epoch = self.owned, preparation.command.owned, epoch
            self._preparation = None
            self._keep()

    def retire(self, epoch: int) -> None:
        """Take frames of no other epoch; what only those needed may leave."""
        with self._lock:
            if epoch == self.epoch:
                self.taken, self._before = (epoch,), {}
                self._keep()

    def abort(self, epoch: int) -> None:
        """Let go of what was prepared for an epoch that is not published."""
        with self._lock:
            if self._preparation is not None and self._preparation.command.epoch == epoch:
                self._give_up()
                self._preparation = None
                self.taken = tuple(each for each in self.taken if each != epoch)
                self._keep()

    def set(self, epoch: int, owned: Owned) -> None:
        """Own other experts from now on, prepared or not."""
        with self._lock:
            self._give_up()
            self._preparation, self._before = None, {}
            self.owned, self.epoch, self.taken = owned, epoch, (epoch,)
            self._keep()

    def _give_up(self) -> None:
        if self._preparation is not None:
            self._preparation.given_up.set()

    def _prepare(self) -> None:
        """Fetch for the epoch that is being prepared, if any; who waits for it hears what went wrong."""
        with self._lock:
            preparation = self._preparation
        if preparation is None or preparation.is_done or preparation.problem is not None:
            return
        try:
            self._fetch_all(preparation)
        except MoesaicError as error:
            preparation.problem = error.message
        except Exception as error:
            preparation.problem = repr(error)
            raise

    def _fetch_all(self, preparation: _Preparation) -> None:
        command, slot_bytes = preparation.command, self._store.slot_bytes
        free_at_s = time.monotonic()
        for chunk in self._chunks(preparation.missing):
            if self._loop.is_stopped or preparation.given_up.wait(max(0.0, free_at_s - time.monotonic())):
                return
            absent = self._fetch(preparation, chunk)
            self._verify(preparation, [index for index in chunk if index not in absent])
            if preparation.problem is not None:
                return
            num_bytes = (len(chunk) - len(absent)) * slot_bytes
            with self._lock:
                preparation.moved_bytes += num_bytes
                preparation.missing = [index for index in preparation.missing if index not in chunk]
            free_at_s = max(free_at_s, time.monotonic() - 1.0) + num_bytes / max(1.0, command.bytes_per_s)
        with self._lock:
            if self._preparation is preparation:
                preparation.is_done = True
                self.taken = tuple(sorted({*self.taken, command.epoch}))
                self._keep()

    def _chunks(self, missing: Sequence[int]) -> list[list[int]]:
        """Layer after layer, a few experts at a time."""
        layers: dict[int, list[int]] = {}
        count = max(1, min(_CHUNK, _CHUNK_BYTES // self._store.slot_bytes))
        for index in sorted(missing):
            layers.setdefault(self._store.form.expert(index).layer, []).append(index)
        return [ids[at : at + count] for ids in layers.values() for at in range(0, len(ids), count)]

    def _fetch(self, preparation: _Preparation, chunk: Sequence[int]) -> list[int]:
        """Those of a chunk that did not come; there is no room for them.

        Raises:
            ExpertReadError: one could not be read, or did not come in time; says why.
        """
        command = preparation.command
        hosts = ((index, command.sources.get(self._store.form.expert(index))) for index in chunk)
        offers = {index: host for index, host in hosts if host is not None}
        self._num_chunks += 1
        with self._lock:
            if self._preparation is not preparation:
                return list(chunk)
            if self._peers is not None:
                self._peers.offered = offers if self._prefers_peers() else {}
            self._keep(coming=self._indices(command.owned), up_to=chunk[-1])
        try:
            absent = self._store.protected.wait(chunk, _CHUNK_TIMEOUT_S, preparation.given_up)
        finally:
            if self._peers is not None:
                self._peers.offered = {}
        reasons = [reason for index in absent if (reason := self._store.protected.failure(index)) is not None]
        if reasons:
            raise ExpertReadError(reasons[0])
        if absent and not self._store.protected.is_full and not preparation.given_up.is_set():
            layer, expert = self._store.form.expert(absent[0])
            raise ExpertReadError(f"expert {expert} of layer {layer} did not come within {_CHUNK_TIMEOUT_S:.0f} s")
        return absent

    def _prefers_peers(self) -> bool:
        """Whether other hosts' memory gives experts in less time than the disk, as measured; now and then the other."""
        peer_s, disk_s = self._store.load_s_from(Tier.REMOTE), self._store.load_s_from(Tier.DISK)
        if not peer_s or not disk_s:
            return not peer_s
        return (peer_s <= disk_s) is not (self._num_chunks % _EXPLORE == _EXPLORE - 1)

    def _verify(self, preparation: _Preparation, indices: Sequence[int]) -> None:
        """Compare what came with what the hosts have that own it so far, where they have it in memory."""
        sources: dict[int, list[int]] = {}
        for index in indices:
            host = preparation.command.sources.get(self._store.form.expert(index))
            if host is not None:
                sources.setdefault(host, []).append(index)
        peers = self._peers
        for host, theirs in sources.items() if peers is not None else ():
            assert peers is not None
            for index, checksum in peers.checksums(host, theirs).items():
                ours = self._store.protected.read(index, zlib.crc32)
                if ours is not None and ours != checksum:
                    layer, expert = self._store.form.expert(index)
                    preparation.problem = (
                        f"expert {expert} of layer {layer} has checksum {ours:08x} here and {checksum:08x} on expert "
                        f"host {host}: their checkpoints differ, or memory is damaged"
                    )
                    return

    def _keep(self, coming: Sequence[int] = (), up_to: int = -1) -> None:
        """Tell the memory what to have. Args: coming: of the epoch being prepared, fetched up to this index."""
        size = self._store.grid.size
        kept, priority = np.zeros(size, dtype=np.bool_), np.zeros(size, dtype=np.float32)
        preparation = self._preparation
        if preparation is not None and preparation.is_done:
            coming, up_to = self._indices(preparation.command.owned), size
        for index in coming:
            kept[index] = True
            priority[index] = _COMING if index <= up_to else 0.0
        for owned in (self._before, self.owned):
            indices = self._indices(owned)
            kept[indices] = True
            priority[indices] = _OWNED
        self._store.protected.protect(kept, priority)
        self._on_epochs(self.epoch, self.taken)

    def _indices(self, owned: Owned) -> list[int]:
        grid = self._store.grid
        first = {layer: row * grid.num_experts for row, layer in enumerate(grid.layers)}
        return [first[layer] + expert for layer, experts in sorted(owned.items()) for expert in experts]
