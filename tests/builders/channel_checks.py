"""A real expert host but for its experts, a channel to it, and what may be asked of both."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import pytest
from fake_host import (
    FakeHost,
    connect,
    expected_sums,
    make_frame,
    running_host,
    soon,
)

from actors.data_plane.channel import ExpertChannel, HostLost
from actors.data_plane.connect import Carrier
from actors.data_plane.frames import Answer, CombineFrame, DispatchFrame

CARRIERS: tuple[Carrier, ...] = ("shared_memory", "grpc")


@pytest.fixture(params=CARRIERS)
def carrier(request: pytest.FixtureRequest) -> Carrier:
    return request.param


@pytest.fixture
def host() -> Iterator[FakeHost]:
    with running_host() as running:
        yield running


@pytest.fixture
def channel(host: FakeHost, carrier: Carrier) -> Iterator[ExpertChannel]:
    made = connect(carrier, host.endpoint)
    yield made
    made.close()


@contextmanager
def held_back(host: FakeHost) -> Iterator[None]:
    """The device is busy inside: frames that are sent wait for each other."""
    with connect_closing(host) as other:
        host.backend.at_gate.clear()
        host.backend.gate.clear()
        other.send(make_frame(other, 1, layer=0))
        assert host.backend.at_gate.wait(10)
        try:
            yield
        finally:
            host.backend.gate.set()


@contextmanager
def connect_closing(host: FakeHost, carrier: Carrier = "shared_memory") -> Iterator[ExpertChannel]:
    channel = connect(carrier, host.endpoint)
    try:
        yield channel
    finally:
        channel.close()


def sums_of(answer: Answer) -> np.ndarray:
    assert isinstance(answer, CombineFrame), answer
    return answer.rows.copy()


def ask_host(channel: ExpertChannel, frame: DispatchFrame) -> Answer:
    channel.send(frame)
    return channel.receive(frame.sequence, soon())


def answers_right(channel: ExpertChannel, num_rows: int = 3) -> bool:
    frame = make_frame(channel, num_rows)
    return np.array_equal(sums_of(ask_host(channel, frame)), expected_sums(frame))


def lost_within(seconds: float, call: Callable[[], Any]) -> HostLost:
    began = time.monotonic()
    with pytest.raises(HostLost) as caught:
        call()
    assert time.monotonic() - began < seconds
    return caught.value
