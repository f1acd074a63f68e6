"""How every carrier notices a host that ends, is late, or whose bytes are damaged."""

from __future__ import annotations

import time
from typing import Any

import numpy as np
import pytest
from channel_checks import answers_right, ask_host, connect_closing, held_back, lost_within, sums_of
from fake_host import (
    MAX_ROWS,
    FakeHost,
    connect,
    expected_sums,
    make_frame,
    running_host,
    soon,
    wait_until,
)

from actors.data_plane import frames, grpc_stream
from actors.data_plane.channel import ExpertChannel, HostLost
from actors.data_plane.connect import Carrier
from actors.data_plane.frames import Answer
from actors.expert_host import handler


def test_host_that_ends_is_noticed_at_once(host: FakeHost, channel: ExpertChannel) -> None:
    assert answers_right(channel)
    frame = make_frame(channel)
    with held_back(host):
        channel.send(frame)
        host.owner._stop.set()  # it ends after the batch under way
        host.server.stop()
    lost = lost_within(5, lambda: channel.receive(frame.sequence, soon(60)))
    assert "host host" in lost.message
    lost_within(5, lambda: ask_host(channel, make_frame(channel)))


def test_no_answer_is_a_lost_host_at_the_deadline(host: FakeHost, channel: ExpertChannel) -> None:
    frame = make_frame(channel)
    with held_back(host):
        channel.send(frame)
        began = time.monotonic()
        lost = lost_within(5, lambda: channel.receive(frame.sequence, time.monotonic() + 0.3))
        assert time.monotonic() - began >= 0.29
        assert "no answer in time" in lost.message
        lost_within(1, lambda: ask_host(channel, make_frame(channel)))
    with connect_closing(host) as anew:
        assert answers_right(anew), "the host outlives the worker that gave up"


def test_slow_answer_is_dropped_when_it_comes_and_the_connection_goes_on(
    host: FakeHost, channel: ExpertChannel
) -> None:
    """More often than there are slots for frames under way: dropped answers give theirs back."""
    for _ in range(2):
        frames = [make_frame(channel, 2, seed=seed) for seed in range(3)]
        with held_back(host):
            for frame in frames:
                channel.send(frame)
            assert not channel.wait_for(frames[0].sequence, time.monotonic() + 0.05)
            for frame in frames[:2]:
                channel.abandon(frame.sequence)
            assert not channel.settle()
        assert np.array_equal(sums_of(channel.receive(frames[2].sequence, soon())), expected_sums(frames[2]))
        wait_until(channel.settle, "the late answers")
    assert answers_right(channel)


def test_lost_host_is_noticed_by_who_waits_for_nothing_any_more(host: FakeHost, channel: ExpertChannel) -> None:
    frame = make_frame(channel)
    with held_back(host):
        channel.send(frame)
        assert not channel.wait_for(frame.sequence, time.monotonic() + 0.05)
        channel.abandon(frame.sequence)
        host.owner._stop.set()
        host.server.stop()
    with pytest.raises(HostLost):
        wait_until(channel.settle, "the end")
    assert channel.wait_for(make_frame(channel).sequence, soon()), "receiving says that it is gone"


def test_checksums_cover_the_arrays_both_ways(carrier: Carrier) -> None:
    with running_host(checked=True) as host:
        channel = connect(carrier, host.endpoint, checked=True)
        assert answers_right(channel, MAX_ROWS)
        channel.close()


@pytest.mark.parametrize("at", [0, 30, 130])
def test_damaged_answer_is_a_lost_host(carrier: Carrier, monkeypatch: pytest.MonkeyPatch, at: int) -> None:
    """Of the header, or of rows with a checksum; over gRPC, of rows with a checksum."""

    def damage(answer: Answer, buffer: memoryview, *, checked: bool) -> int:
        length = frames.encode_answer(answer, buffer, checked=checked)
        buffer[at] ^= 1
        return length

    def flip(answer: Answer, *, checked: bool) -> Any:
        response = to_response(answer, checked=checked)
        rows = bytearray(response.combine.rows)
        rows[at] ^= 1
        response.combine.rows = bytes(rows)
        return response

    to_response = grpc_stream.answer_message
    monkeypatch.setattr(handler, "encode_answer", damage)
    monkeypatch.setattr(grpc_stream, "answer_message", flip)
    with running_host(checked=True) as host:
        channel = connect(carrier, host.endpoint, checked=True)
        lost = lost_within(5, lambda: ask_host(channel, make_frame(channel)))
        assert "damaged answer" in lost.message
        lost_within(5, lambda: ask_host(channel, make_frame(channel)))


def test_answer_over_grpc_that_is_cut_is_a_lost_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a checksum, too: its length cannot be."""

    def cut(answer: Answer, *, checked: bool) -> Any:
        response = to_response(answer, checked=checked)
        response.combine.rows = response.combine.rows[:-1]
        return response

    to_response = grpc_stream.answer_message
    monkeypatch.setattr(grpc_stream, "answer_message", cut)
    with running_host() as host:
        channel = connect("grpc", host.endpoint)
        assert "damaged answer" in lost_within(5, lambda: ask_host(channel, make_frame(channel))).message
