"""Carrier three: one Ray actor call for each frame. Slow (about a millisecond); kept as the reference and for hosts
that nothing else reaches."""

from __future__ import annotations

from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError

from actors.data_plane.channel import CONNECT_TIMEOUT_S, HostEndpoint, HostLost, Welcome, remaining_s
from actors.data_plane.frames import (
    Answer,
    DispatchFrame,
    FrameError,
    decode_answer,
    dispatch_bytes,
    encode_dispatch,
)


def find_actor(endpoint: HostEndpoint) -> Any:
    """The actor behind an endpoint.

    Raises:
        ConnectionError: there is none of that name.
    """
    try:
        return ray.get_actor(endpoint.actor_name, namespace=endpoint.actor_namespace)
    except ValueError as error:
        raise ConnectionError(f"no actor {endpoint.actor_name!r}") from error


class ActorCallChannel:
    """A worker's side; the host is an actor with `welcome_json(worker, fingerprint)`, `dispatch(frame bytes)` and
    `hear_outlook(worker, bytes)`."""

    carrier = "actor call"

    def __init__(self, host: Any, *, worker_id: str, fingerprint: str, checked: bool = False) -> None:
        """Raises OSError if the host does not answer, MoesaicError if it refuses us."""
        self._host = host
        self._worker_id = worker_id
        self._checked = checked
        self._asked: dict[int, Any] = {}
        self._abandoned: list[Any] = []
        self._sequence = 0
        try:
            value: Any = ray.get(host.welcome_json.remote(worker_id, fingerprint), timeout=CONNECT_TIMEOUT_S)
        except RayError as error:
            raise ConnectionError(f"the host's actor does not answer: {error}") from error
        if "refused" in value:
            raise HostLost(f"the host refused this worker: {value['refused']}")
        self.welcome = Welcome.from_json(value)

    def next_sequence(self) -> int:
        self._sequence += 1
        return self._sequence

    def send(self, frame: DispatchFrame) -> None:
        (T, D), K = frame.rows.shape, frame.expert_ids.shape[1]
        buffer = bytearray(dispatch_bytes(T, D, K, frame.rows.itemsize))
        encode_dispatch(frame, memoryview(buffer), checked=self._checked)
        self._asked[frame.sequence] = self._host.dispatch.remote(bytes(buffer))

    def send_outlook(self, data: bytes) -> None:
        self._host.hear_outlook.remote(self._worker_id, data)

    def receive(self, sequence: int, deadline_s: float) -> Answer:
        try:
            data: Any = ray.get(self._asked.pop(sequence), timeout=remaining_s(deadline_s))
            return decode_answer(memoryview(bytearray(data)))
        except GetTimeoutError as error:
            raise HostLost(f"host {self.welcome.host_id}: no answer in time") from error
        except (RayError, FrameError) as error:
            raise HostLost(f"host {self.welcome.host_id}: {error}") from error

    def wait_for(self, sequence: int, deadline_s: float) -> bool:
        return bool(ray.wait([self._asked[sequence]], timeout=remaining_s(deadline_s))[0])

    def abandon(self, sequence: int) -> None:
        self._abandoned.append(self._asked.pop(sequence))

    def settle(self) -> bool:
        if self._abandoned:
            self._abandoned = ray.wait(self._abandoned, num_returns=len(self._abandoned), timeout=0)[1]
        return not self._abandoned

    def close(self) -> None:
        self._asked.clear()
        self._abandoned.clear()
