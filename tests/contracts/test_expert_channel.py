"""One contract for every carrier between a worker and an expert host; the host is real but for its experts."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import fake_host
import numpy as np
import pytest
from fake_host import (
    DIM,
    MAX_ROWS,
    NUM_EXPERTS,
    TOP_K,
    FakeHost,
    connect,
    expected_sums,
    make_frame,
    running_host,
    soon,
    wait_until,
)

from actors.data_plane import frames, grpc_stream
from actors.data_plane.actor_call import ActorCallChannel
from actors.data_plane.channel import ExpertChannel, HostLost
from actors.data_plane.connect import Carrier
from actors.data_plane.frames import Answer, CombineFrame, DispatchFrame, RefusalFrame, RefusalReason
from actors.expert_host import handler
from cluster.errors import ExpertReadError

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
def _held_back(host: FakeHost) -> Iterator[None]:
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


def _sums(answer: Answer) -> np.ndarray:
    assert isinstance(answer, CombineFrame), answer
    return answer.rows.copy()


def _ask(channel: ExpertChannel, frame: DispatchFrame) -> Answer:
    channel.send(frame)
    return channel.receive(frame.sequence, soon())


def _answers_right(channel: ExpertChannel, num_rows: int = 3) -> bool:
    frame = make_frame(channel, num_rows)
    return np.array_equal(_sums(_ask(channel, frame)), expected_sums(frame))


def _lost_within(seconds: float, call: Callable[[], Any]) -> HostLost:
    began = time.monotonic()
    with pytest.raises(HostLost) as caught:
        call()
    assert time.monotonic() - began < seconds
    return caught.value


def test_sums_come_back_row_for_row(channel: ExpertChannel) -> None:
    for num_rows in (1, 2, 33, MAX_ROWS):
        assert _answers_right(channel, num_rows)


def test_bfloat16_rows_are_understood(channel: ExpertChannel) -> None:
    frame = make_frame(channel, 5)
    upper = (frame.rows.view(np.uint32) >> 16).astype(np.uint16)
    rounded = (upper.astype(np.uint32) << 16).view(np.float32)

    sums = _sums(_ask(channel, replace(frame, rows=upper)))

    assert np.array_equal(sums, expected_sums(replace(frame, rows=rounded)))


def test_answers_of_frames_in_flight_are_taken_in_any_order(host: FakeHost, channel: ExpertChannel) -> None:
    for turn in range(5):
        frames = [make_frame(channel, 2 + i, seed=10 * turn + i, layer=(0, 3)[i % 2]) for i in range(4)]
        for frame in frames:
            channel.send(frame)
        for i in (2, 0, 3, 1):
            sums = _sums(channel.receive(frames[i].sequence, soon()))
            assert np.array_equal(sums, expected_sums(frames[i])), f"frame {i} of turn {turn}"


def test_frames_of_two_workers_join_one_batch_and_each_gets_its_own(host: FakeHost, channel: ExpertChannel) -> None:
    with connect_closing(host, "grpc") as second, connect_closing(host) as third:
        workers = (channel, second, third)
        frames = [make_frame(worker, 3 + i, seed=i) for i, worker in enumerate(workers)]
        with _held_back(host):
            for worker, frame in zip(workers, frames, strict=True):
                worker.send(frame)
            num_streams = sum(worker.carrier == "grpc" for worker in workers)
            wait_until(lambda: len(host.submitted) == num_streams, "the streams' frames wait too")
        for worker, frame in zip(workers, frames, strict=True):
            assert np.array_equal(_sums(worker.receive(frame.sequence, soon())), expected_sums(frame))
    assert host.backend.batches[1:] == [(3, 3 + 4 + 5)]


def test_frame_of_an_old_plan_is_refused_with_the_new_epoch(host: FakeHost, channel: ExpertChannel) -> None:
    host.pool.set_epochs(5, (5,))

    refusal = _ask(channel, make_frame(channel))

    assert isinstance(refusal, RefusalFrame)
    assert (refusal.reason, refusal.epoch) == (RefusalReason.STALE_EPOCH, 5)
    frame = make_frame(channel, epoch=5)
    assert np.array_equal(_sums(_ask(channel, frame)), expected_sums(frame)), "the connection goes on"
    with connect_closing(host) as anew:
        assert anew.welcome.epoch == 5


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"layer": 1}, "layer 1"),
        ({"layer": 2**32 - 1}, f"layer {2**32 - 1}"),
        ({"expert_ids": np.full((3, TOP_K), NUM_EXPERTS + 1)}, f"expert {NUM_EXPERTS + 1}"),
        ({"expert_ids": np.full((3, TOP_K), -1)}, "expert -1"),
        ({"expert_ids": np.full((3, TOP_K), 2**62)}, f"expert {2**62}"),
        ({"rows": np.ones((3, DIM // 2), np.float32)}, f"rows of {DIM // 2}"),
        (
            {"expert_ids": np.zeros((3, NUM_EXPERTS + 1), np.int64), "weights": np.zeros((3, NUM_EXPERTS + 1), "f4")},
            f"{NUM_EXPERTS + 1} choices",
        ),
    ],
)
def test_what_a_kernel_could_not_survive_is_refused_and_harms_nobody(
    host: FakeHost, channel: ExpertChannel, changes: dict[str, Any], words: str
) -> None:
    refusal = _ask(channel, make_frame(channel, **changes))

    assert isinstance(refusal, RefusalFrame)
    assert refusal.reason is RefusalReason.DAMAGED
    assert words in refusal.message
    assert host.backend.batches == []
    assert _answers_right(channel)


def test_damaged_frame_does_not_spoil_the_batch_it_would_have_joined(host: FakeHost, channel: ExpertChannel) -> None:
    with connect_closing(host) as other:
        good, bad = make_frame(channel), make_frame(other, expert_ids=np.full((3, TOP_K), 99))
        with _held_back(host):
            other.send(bad)
            channel.send(good)
            wait_until(lambda: len(host.submitted) == (channel.carrier == "grpc"), "both wait")
        assert np.array_equal(_sums(channel.receive(good.sequence, soon())), expected_sums(good))
        assert isinstance(other.receive(bad.sequence, soon()), RefusalFrame)


def test_host_that_cannot_compute_says_why_and_goes_on(host: FakeHost, channel: ExpertChannel) -> None:
    host.backend.fail = ExpertReadError("model.safetensors: shorter than its header says" + "!" * 10_000)

    refusal = _ask(channel, make_frame(channel))

    assert isinstance(refusal, RefusalFrame)
    assert refusal.reason is RefusalReason.FAILED
    assert refusal.message.startswith("model.safetensors: shorter")
    host.backend.fail = None
    assert _answers_right(channel)


def test_late_frame_is_refused(host: FakeHost, channel: ExpertChannel) -> None:
    frame = make_frame(channel, deadline_us=0)
    with _held_back(host):
        channel.send(frame)
        wait_until(lambda: len(host.submitted) == (channel.carrier == "grpc"), "it arrived")
    refusal = channel.receive(frame.sequence, soon())

    assert isinstance(refusal, RefusalFrame)
    assert refusal.reason is RefusalReason.LATE


def test_host_that_ends_is_noticed_at_once(host: FakeHost, channel: ExpertChannel) -> None:
    assert _answers_right(channel)
    frame = make_frame(channel)
    with _held_back(host):
        channel.send(frame)
        host.owner._stop.set()  # it ends after the batch under way
        host.server.stop()
    lost = _lost_within(5, lambda: channel.receive(frame.sequence, soon(60)))
    assert "host host" in lost.message
    _lost_within(5, lambda: _ask(channel, make_frame(channel)))


def test_no_answer_is_a_lost_host_at_the_deadline(host: FakeHost, channel: ExpertChannel) -> None:
    frame = make_frame(channel)
    with _held_back(host):
        channel.send(frame)
        began = time.monotonic()
        lost = _lost_within(5, lambda: channel.receive(frame.sequence, time.monotonic() + 0.3))
        assert time.monotonic() - began >= 0.29
        assert "no answer in time" in lost.message
        _lost_within(1, lambda: _ask(channel, make_frame(channel)))
    with connect_closing(host) as anew:
        assert _answers_right(anew), "the host outlives the worker that gave up"


def test_slow_answer_is_dropped_when_it_comes_and_the_connection_goes_on(
    host: FakeHost, channel: ExpertChannel
) -> None:
    """More often than there are slots for frames under way: dropped answers give theirs back."""
    for _ in range(2):
        frames = [make_frame(channel, 2, seed=seed) for seed in range(3)]
        with _held_back(host):
            for frame in frames:
                channel.send(frame)
            assert not channel.wait_for(frames[0].sequence, time.monotonic() + 0.05)
            for frame in frames[:2]:
                channel.abandon(frame.sequence)
            assert not channel.settle()
        assert np.array_equal(_sums(channel.receive(frames[2].sequence, soon())), expected_sums(frames[2]))
        wait_until(channel.settle, "the late answers")
    assert _answers_right(channel)


def test_lost_host_is_noticed_by_who_waits_for_nothing_any_more(host: FakeHost, channel: ExpertChannel) -> None:
    frame = make_frame(channel)
    with _held_back(host):
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
        assert _answers_right(channel, MAX_ROWS)
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
        lost = _lost_within(5, lambda: _ask(channel, make_frame(channel)))
        assert "damaged answer" in lost.message
        _lost_within(5, lambda: _ask(channel, make_frame(channel)))


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
        assert "damaged answer" in _lost_within(5, lambda: _ask(channel, make_frame(channel))).message


@pytest.mark.parametrize("name", ["rows", "expert_ids", "weights", "layer", "num_rows"])
def test_damaged_frame_over_grpc_is_refused(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """With checksums on, whichever part a bad transport has changed."""

    def damaged(frame: DispatchFrame, *, checked: bool) -> Any:
        message = to_message(frame, checked=checked)
        value = getattr(message, name)
        setattr(message, name, value + 1 if isinstance(value, int) else bytes([value[0] ^ 1]) + value[1:])
        return message

    to_message = grpc_stream.dispatch_message
    monkeypatch.setattr(grpc_stream, "dispatch_message", damaged)
    with running_host(checked=True) as host:
        channel = connect("grpc", host.endpoint, checked=True)
        answer = _ask(channel, make_frame(channel))
        assert isinstance(answer, RefusalFrame)
        assert answer.reason is RefusalReason.DAMAGED
        assert "checksum" in answer.message
        channel.close()


@pytest.mark.ray
def test_actor_call_keeps_the_contract() -> None:
    """The slow reference: Ray moves the same frames."""
    import ray

    ray.cloudpickle.register_pickle_by_value(fake_host)
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    try:
        actor: Any = ray.remote(fake_host.ActorHost).options(max_concurrency=4).remote()
        ray.get(actor.__ray_ready__.remote(), timeout=120)  # a process starts slowly on a busy machine
        with pytest.raises(HostLost, match="the worker other"):
            ActorCallChannel(actor, worker_id="w", fingerprint="other")
        channel = ActorCallChannel(actor, worker_id="w", fingerprint=fake_host.FINGERPRINT, checked=True)
        assert channel.welcome.owned[3] == tuple(range(NUM_EXPERTS))
        frames_ = [make_frame(channel, 2 + i, seed=i) for i in range(3)]
        for frame in frames_:
            channel.send(frame)
        for frame in reversed(frames_):
            assert np.array_equal(_sums(channel.receive(frame.sequence, soon(30))), expected_sums(frame))
        late = make_frame(channel)
        channel.send(late)
        assert channel.wait_for(late.sequence, soon(30))
        channel.abandon(late.sequence)
        wait_until(channel.settle, "the answer that nobody wants")
        stale = _ask(channel, make_frame(channel, epoch=9))
        assert isinstance(stale, RefusalFrame)
        assert (stale.reason, stale.epoch) == (RefusalReason.STALE_EPOCH, 1)
        foreign = _ask(channel, make_frame(channel, layer=1))
        assert isinstance(foreign, RefusalFrame)
        ray.kill(actor)
        _lost_within(10, lambda: _ask(channel, make_frame(channel)))
    finally:
        ray.shutdown()
