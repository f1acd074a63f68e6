"""Chooses the carrier to a host by what works: shared memory if the handshake shows it, else gRPC.

The actor call is used only when it is asked for. Knows the carriers, and no more of them than how to connect.
"""

from __future__ import annotations

from typing import Literal

from actors.data_plane.channel import ExpertChannel, HostEndpoint, StreamLimits
from actors.data_plane.frames import combine_bytes, dispatch_bytes
from actors.data_plane.shared_memory import connect_shared_memory
from cluster.config.sections import ExpertsConfig
from cluster.config.sizes import parse_size

Carrier = Literal["auto", "shared_memory", "grpc", "actor_call"]


def stream_limits(experts: ExpertsConfig) -> StreamLimits:
    """Of gRPC streams, as configured."""
    return StreamLimits(
        max_bytes=parse_size(experts.max_frame_bytes), max_streams=experts.max_streams, keepalive_s=experts.keepalive_s
    )


class Connector:
    """Connects one worker to hosts."""

    def __init__(
        self,
        carrier: Carrier,
        *,
        worker_id: str,
        fingerprint: str,
        max_rows: int,
        dim: int,
        top_k: int,
        checked: bool = False,
        limits: StreamLimits | None = None,
    ) -> None:
        """Args: carrier: `auto` or the only one to try. max_rows, dim, top_k: of the largest frame. limits: of gRPC
        streams; None: as they are by default."""
        self._limits = limits or StreamLimits()
        self._carrier = carrier
        self._worker_id = worker_id
        self._fingerprint = fingerprint
        self._slot_bytes = max(dispatch_bytes(max_rows, dim, top_k, 4), combine_bytes(max_rows, dim))
        self._checked = checked

    def connect(self, endpoint: HostEndpoint) -> ExpertChannel:
        """The best channel to a host.

        Raises:
            OSError: it cannot be reached. MoesaicError: it refuses this worker; says why.
        """
        if self._carrier in ("auto", "shared_memory"):
            try:
                return connect_shared_memory(
                    endpoint,
                    worker_id=self._worker_id,
                    fingerprint=self._fingerprint,
                    slot_bytes=self._slot_bytes,
                    checked=self._checked,
                )
            except OSError:  # no such socket here: another machine, or another network
                if self._carrier != "auto":
                    raise
        if self._carrier in ("auto", "grpc"):
            from actors.data_plane.grpc_stream import GrpcChannel  # gRPC only where it is used

            return GrpcChannel(
                endpoint,
                worker_id=self._worker_id,
                fingerprint=self._fingerprint,
                checked=self._checked,
                limits=self._limits,
            )
        from actors.data_plane.actor_call import ActorCallChannel, find_actor

        actor = find_actor(endpoint)
        return ActorCallChannel(actor, worker_id=self._worker_id, fingerprint=self._fingerprint, checked=self._checked)
