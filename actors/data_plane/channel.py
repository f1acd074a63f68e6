"""The protocol of the expert data plane: what a worker holds for each host, whatever carries the frames."""

from __future__ import annotations

import time
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np

from actors.data_plane.frames import MAX_FRAME_BYTES, Answer, CombineFrame, DispatchFrame, FrameError
from cluster.errors import MoesaicError

CONNECT_TIMEOUT_S = 5.0


class HostLost(MoesaicError):
    """A host's connection ended, or its answer did not come in time; what was asked of it is to be asked elsewhere."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HostEndpoint:
    """Where a host listens and what a worker must know there. Travels through Ray only."""

    host_id: str
    socket_name: str  # abstract Unix socket
    grpc_address: str
    secret: str = field(repr=False)
    actor_name: str = ""  # in Ray, for the actor-call carrier
    actor_namespace: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class StreamLimits:
    """Of gRPC streams between workers and hosts.

    max_bytes: of one message. max_streams: that a host serves at once. keepalive_s: a silent peer is asked after this
    long, and lost after two times as long without an answer.
    """

    max_bytes: int = MAX_FRAME_BYTES
    max_streams: int = 64
    keepalive_s: float = 2.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Hello:
    """A worker introduces itself. `slot_bytes` is for the largest frame either way, `nonce` proves shared memory."""

    worker_id: str
    fingerprint: str
    num_slots: int = 0
    slot_bytes: int = 0
    nonce: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Welcome:
    """A host introduces itself: the plan epoch, the experts that it owns, by layer, and the nonce it read.

    num_slots: experts that its memory holds. gives_way: whether a prefetch of need lets a demand go first there.
    """

    host_id: str
    epoch: int
    num_experts: int
    owned: Mapping[int, tuple[int, ...]]
    nonce: str = ""
    num_slots: int = 0
    gives_way: bool = True

    def to_json(self) -> dict[str, Any]:
        """Plain values; owned experts as hexadecimal bit sets."""
        bits = {str(layer): _to_bits(experts) for layer, experts in self.owned.items()}
        return {
            "host_id": self.host_id,
            "epoch": self.epoch,
            "num_experts": self.num_experts,
            "owned": bits,
            "nonce": self.nonce,
            "num_slots": self.num_slots,
            "gives_way": self.gives_way,
        }

    @classmethod
    def from_json(cls, value: dict[str, Any]) -> Welcome:
        """Inverse of `to_json`."""
        owned = {int(layer): _from_bits(bits) for layer, bits in value.pop("owned").items()}
        return cls(owned=owned, **value)


class ExpertChannel(Protocol):
    """One connection of a worker to a host, used by the engine's thread alone. Frames may be answered in any order."""

    welcome: Welcome
    carrier: str

    def next_sequence(self) -> int:
        """A number for the next frame."""
        ...

    def send(self, frame: DispatchFrame) -> None:
        """Give a frame to the host; does not wait for its answer.

        Raises:
            HostLost: the connection is gone.
        """
        ...

    def receive(self, sequence: int, deadline_s: float) -> Answer:
        """The answer to the frame `sequence`, no later than `deadline_s` (time.monotonic).

        A combine frame's rows are valid until the next call of this channel.

        Raises:
            HostLost: the connection is gone, or the answer did not come in time (the channel is closed then).
        """
        ...

    def wait_for(self, sequence: int, deadline_s: float) -> bool:
        """Wait until the answer to the frame `sequence` can be received; False at the deadline. The connection stands.

        True also if it is gone: receiving says so.
        """
        ...

    def send_outlook(self, data: bytes) -> None:
        """Tell the host what is expected of its experts (cluster/policies/outlook.py); from any thread. Does not wait,
        and may be lost: the next one replaces it."""
        ...

    def abandon(self, sequence: int) -> None:
        """Nobody wants the answer to the frame `sequence` any more: it is dropped when it comes."""
        ...

    def settle(self) -> bool:
        """Whether every abandoned answer has come by now; does not wait.

        Raises:
            HostLost: the connection is gone.
        """
        ...

    def close(self) -> None:
        """End the connection; idempotent."""
        ...


class OutlookSink(Protocol):
    """Who hears on a host what workers expect; from any thread. `worker` stands for one connection."""

    def hear(self, worker: Hashable, data: bytes) -> None:
        """A worker said this."""
        ...

    def forget(self, worker: Hashable) -> None:
        """A worker's connection has ended."""
        ...


def remaining_s(deadline_s: float) -> float:
    """Seconds until `deadline_s` on the monotonic clock, at least a little: timeouts of 0 mean something else."""
    return max(1e-4, deadline_s - time.monotonic())


def checked_rows(frame: DispatchFrame, answer: Answer) -> Answer:
    """The answer, if it fits the frame that it answers."""
    if isinstance(answer, CombineFrame) and answer.rows.shape != frame.rows.shape:
        raise FrameError(f"answer of shape {answer.rows.shape} to rows of shape {frame.rows.shape}")
    return answer


def _to_bits(experts: tuple[int, ...]) -> str:
    value = 0
    for expert in experts:
        value |= 1 << expert
    return f"{value:x}"


def _from_bits(bits: str) -> tuple[int, ...]:
    value = int(bits, 16)
    raw = np.frombuffer(value.to_bytes((value.bit_length() + 7) // 8 or 1, "little"), np.uint8)
    return tuple(np.flatnonzero(np.unpackbits(raw, bitorder="little")).tolist())
