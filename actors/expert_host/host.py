"""An expert host: owns experts' memory and compute, and answers workers' frames. A plain class around its four parts.

Ray starts it (actors/ray_shells/host_actor.py) and is not on its path. It owns the experts that the placement gives it
and has them in memory; any other expert it can still read from the checkpoint.
"""

from __future__ import annotations

import logging
import os
import secrets
import threading
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future

import numpy as np

from actors.data_plane.channel import Hello, HostEndpoint, Welcome
from actors.data_plane.connect import stream_limits
from actors.data_plane.frames import (
    Answer,
    FrameError,
    combine_bytes,
    decode_dispatch,
    encode_answer,
)
from actors.data_plane.grpc_stream import ExpertServer
from actors.data_plane.task import DispatchTask
from actors.expert_host.batching_pool import BatchingPool
from actors.expert_host.device_owner import DeviceOwner
from actors.expert_host.handler import HostHandler
from actors.expert_host.outlooks import HostOutlooks
from actors.expert_host.owned_experts import OwnedExperts
from actors.experts.backend import ExpertBackend
from actors.experts.memory.peer import Peers
from actors.experts.memory.report import layers_report
from actors.experts.memory.shelves import RemoteReadError, form_digest
from actors.experts.memory.store import ExpertStore
from cluster.config.load import MoesaicConfig, host_threads
from cluster.errors import MoesaicError, Unavailable
from cluster.execution.batch_cost import BatchCost
from cluster.logs import log_event
from cluster.model.info import ModelInfo
from cluster.node_memory.leases import MemoryLease
from cluster.placement.migration import CommandKind, HostCommand, HostEpochs
from cluster.status.expert_memory import ExpertMemoryStatus
from cluster.status.experts import ExpertsReport
from cluster.status.host import ExpertHostStatus
from cluster.status.reports import HostReport
from cluster.types import ExpertId, StartupPhase

_LOG = logging.getLogger(__name__)
_ANSWER_TIMEOUT_S = 60.0


class ExpertHost:
    """One host. `start` returns at once; the phase tells when it is ready."""

    def __init__(
        self,
        config: MoesaicConfig,
        info: ModelInfo,
        host_index: int,
        *,
        node_id: str = "",
        peers: Peers | None = None,
        num_nodes: int = 1,
    ) -> None:
        """Args: node_id: Ray's name of where it runs. peers: the other hosts, to get experts from. num_nodes: that
        workers and hosts spread over."""
        self.host_id = f"host-{host_index}-{secrets.token_hex(3)}"  # a new one at every start: an incarnation
        self.phase = StartupPhase.STARTING
        self.error: MoesaicError | None = None
        self.backend: ExpertBackend | None = None
        self.num_hosts = config.experts.hosts
        self._config = config
        self._info = info
        self._index = host_index
        self._node_id, self._peers, self._num_nodes = node_id, peers, num_nodes
        self._lease: MemoryLease | None = None
        self._costs = BatchCost()
        self._experts: OwnedExperts | None = None
        self._form = ""  # of the bytes of its experts, once they are known
        self._secret = secrets.token_hex(16)
        self._pool = BatchingPool(max_rows=config.attention.max_batch_tokens)
        self.outlooks = HostOutlooks()
        self._handler = HostHandler(self._welcome, self.outlooks, secret=self._secret, checked=config.experts.checksums)
        self._owner: DeviceOwner | None = None
        self._server: ExpertServer | None = None
        self._stopped = False
        self._thread = threading.Thread(target=self._load, name="load", daemon=True)

    def start(self, address: str) -> None:
        """Load in a thread of its own. Args: address: of this node, where gRPC listens."""
        self._server = ExpertServer(
            host=address,
            secret=self._secret,
            welcome=self._welcome,
            submit=self._handler.submit,
            outlooks=self.outlooks,
            checked=self._config.experts.checksums,
            limits=stream_limits(self._config.experts),
        )
        self._thread.start()

    def stop(self) -> None:
        """End connections and compute; idempotent."""
        if self._stopped:
            return
        self._stopped = True
        if self._server is not None:
            self._server.stop()
        if self._owner is not None:
            self._owner.stop()
        else:
            self._handler.close()
        self.outlooks.close()
        if self._experts is not None:
            self._experts.close()
        if self.backend is not None:
            self.backend.store.close()
        if self._lease is not None:
            self._lease.close()

    @property
    def owned(self) -> Mapping[int, tuple[int, ...]]:
        """Experts by layer that the published placement gives it."""
        return self._experts.owned if self._experts else {}

    def endpoint(self) -> HostEndpoint:
        """Where workers connect.

        Raises:
            MoesaicError: it could not start, and why. Unavailable: not yet.
        """
        if self.error is not None:
            raise self.error
        if self._owner is not None and not self._owner.is_running:
            raise Unavailable(f"expert host {self._index} does not compute any more; its log says why")
        if self.phase is not StartupPhase.READY or self._server is None:
            raise Unavailable(f"expert host {self._index} is {self.phase}")
        return HostEndpoint(
            host_id=self.host_id,
            socket_name=self._handler.socket_name,
            grpc_address=self._server.address,
            secret=self._secret,
        )

    def welcome_json(self, worker_id: str, fingerprint: str) -> dict[str, object]:
        """The handshake of the actor-call carrier."""
        try:
            return self._welcome(Hello(worker_id=worker_id, fingerprint=fingerprint)).to_json()
        except FrameError as error:
            return {"refused": error.message}

    def dispatch(self, data: bytes) -> bytes:
        """One frame of the actor-call carrier; blocks until it is answered."""
        answered: Future[Answer] = Future()
        frame = decode_dispatch(memoryview(bytearray(data)))
        self._handler.submit(DispatchTask(frame, answered.set_result))
        answer = answered.result(timeout=_ANSWER_TIMEOUT_S)
        buffer, checked = bytearray(combine_bytes(*frame.rows.shape) + 4096), self._config.experts.checksums
        return bytes(buffer[: encode_answer(answer, memoryview(buffer), checked=checked)])

    def hear_outlook(self, worker_id: str, data: bytes) -> None:
        """What a worker expects, by the actor-call carrier."""
        self.outlooks.hear(worker_id, data)

    def set_plan(self, epoch: int, owned: Mapping[int, tuple[int, ...]]) -> None:
        """Own other experts from now on, whether they are in memory or not; frames of other epochs are refused."""
        self._ready_experts().set(epoch, owned)

    def epochs(self) -> HostEpochs:
        """How far this host is with the epochs it was told of. Raises Unavailable while it loads."""
        return self._ready_experts().epochs()

    def tell(self, command: HostCommand) -> HostEpochs:
        """Follow a command, or begin to; a repeated one does nothing. Raises Unavailable while it loads."""
        experts = self._ready_experts()
        match command.kind:
            case CommandKind.PREPARE:
                experts.prepare(command)
            case CommandKind.PUBLISH:
                experts.publish(command.epoch)
            case CommandKind.RETIRE:
                if not self._pool.has_older(command.epoch):  # else the next time: the command is repeated
                    experts.retire(command.epoch)
            case CommandKind.ABORT:
                experts.abort(command.epoch)
        return experts.epochs()

    def checksums(self, form: str, experts: Sequence[ExpertId]) -> dict[ExpertId, int]:
        """CRC-32 of those of these experts that are in the fast tier. Args: form: of the bytes (form_digest)."""
        store = self._store_of(form)
        found = {expert: store.protected.read(store.grid.flat(expert), zlib.crc32) for expert in experts}
        return {expert: crc for expert, crc in found.items() if crc is not None}

    def expert_bytes(self, form: str, expert: ExpertId) -> tuple[np.ndarray, int]:
        """A copy [slot_bytes] uint8 of an expert in the fast tier, and its CRC-32.

        Raises:
            RemoteReadError: it is not there, or not in this form.
        """
        store = self._store_of(form)
        data = store.protected.read(store.grid.flat(expert), lambda view: np.frombuffer(view, dtype=np.uint8).copy())
        if data is None:
            raise RemoteReadError(f"expert {expert} is not in the memory of expert host {self._index} now")
        return data, zlib.crc32(data.data)

    def report(self) -> HostReport:
        """This host now, for the scheduler."""
        owner, backend = self._owner, self.backend
        store = backend.store if backend else None
        return HostReport(
            host_id=self.host_id,
            index=self._index,
            node_id=self._node_id,
            phase=self.phase,
            epochs=self._experts.taken if self._experts else (),
            capacity=store.num_slots if store else 0,
            ram_capacity=store.ram_budget_bytes // store.slot_bytes if store else 0,
            expert_bytes=store.slot_bytes if store else 0,
            resident=_bits(store.resident, store.grid.layers) if store else b"",
            expert_s=self._costs.expert_s,
            row_s=self._costs.row_s,
            miss_s=store.miss_s() if store else {},
            num_rows=self._handler.num_rows,
            num_batches=owner.num_batches if owner else 0,
            busy_s=owner.busy_s if owner else 0.0,
            stall_s=store.counters.total_stall_s if store else 0.0,
        )

    def status(self) -> ExpertHostStatus:
        """What this host says of itself."""
        owner, handler = self._owner, self._handler
        phase, error = self.phase, self.error.message if self.error else None
        if owner is not None and not owner.is_running:
            phase, error = StartupPhase.FAILED, "it does not compute any more; its log says why"
        return ExpertHostStatus(
            host_id=self.host_id,
            phase=phase,
            error=error,
            epoch=self._pool.epoch,
            owned=sum(len(experts) for experts in self.owned.values()),
            num_connections=handler.num_connections + (self._server.num_streams if self._server else 0),
            num_frames=handler.num_frames,
            num_rows=handler.num_rows,
            num_batches=owner.num_batches if owner else 0,
            num_refused=self._pool.num_refused + handler.num_damaged + (owner.num_refused if owner else 0),
            busy_s=owner.busy_s if owner else 0.0,
            expert_memory=self._memory_status(),
        )

    def _memory_status(self) -> ExpertMemoryStatus | None:
        from actors.experts.report import memory_status

        return memory_status(self.backend, self._config.experts, hears=True) if self.backend else None

    def experts_report(self) -> ExpertsReport:
        """Residency per layer; empty while loading."""
        layers = layers_report(self.backend.store, {}) if self.backend else ()
        return ExpertsReport(owner_id=self.host_id, layers=layers)

    def _load(self) -> None:
        from actors.expert_host.build import build_host_backend

        self.phase = StartupPhase.LOADING
        try:
            threads = host_threads(self._config, os.cpu_count() or 2)
            built = build_host_backend(
                self._config, self._info, self._index, threads=threads, peers=self._peers, num_nodes=self._num_nodes
            )
        except MoesaicError as error:
            self.error, self.phase = error, StartupPhase.FAILED
            return
        except Exception as error:  # noqa: BLE001 - transformers raises anything; status has to name it
            log_event(_LOG, logging.ERROR, "loading failed", error=error)
            self.error, self.phase = MoesaicError(f"loading {self._info.path} failed: {error}"), StartupPhase.FAILED
            return
        self.backend = backend = built.backend
        self._lease = built.lease
        self._form = form_digest(backend.store.form)
        if self._stopped:
            backend.store.close()
            built.lease.close()
            return
        self._experts = OwnedExperts(
            self.host_id, backend.store, built.owned, peers=built.peers, on_epochs=self._pool.set_epochs
        )
        self._experts.start()
        self.outlooks.start(backend.store, built.scores)
        owner = DeviceOwner(self._handler, self._pool, backend, self._costs)
        owner.start()
        self._owner = owner
        assert self._server is not None
        self._server.start()
        self.phase = StartupPhase.READY

    def _welcome(self, hello: Hello) -> Welcome:
        if hello.fingerprint != self._info.fingerprint:
            raise FrameError(f"this host serves model {self._info.fingerprint}, the worker {hello.fingerprint}")
        assert self.backend is not None
        return Welcome(
            host_id=self.host_id,
            epoch=self._pool.epoch,
            num_experts=self.backend.store.layout.num_experts,
            owned=self.owned,
            num_slots=self.backend.store.num_slots,
            gives_way=self.backend.store.loads_give_way,
        )

    def _ready_experts(self) -> OwnedExperts:
        if self._experts is None:
            raise self.error or Unavailable(f"expert host {self._index} is {self.phase}")
        return self._experts

    def _store_of(self, form: str) -> ExpertStore:
        if self.backend is None or self._form != form:
            raise RemoteReadError(f"expert host {self._index} has no experts of form {form}")
        return self.backend.store


def _bits(layer_bits: Callable[[int], np.ndarray], layers: Sequence[int]) -> bytes:
    return np.packbits(np.concatenate([layer_bits(layer) for layer in layers])).tobytes()
