"""One contract for every carrier between a worker and an expert host; the host is real but for its experts."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import fake_host
import numpy as np
import pytest
from channel_checks import answers_right, ask_host, connect_closing, held_back, lost_within, sums_of
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

from actors.data_plane import grpc_stream
from actors.data_plane.actor_call import ActorCallChannel
from actors.data_plane.channel import ExpertChannel, HostLost
from actors.data_plane.frames import DispatchFrame, RefusalFrame, RefusalReason
from cluster.errors import ExpertReadError


def test_sums_come_back_row_for_row(channel: ExpertChannel) -> None:
    for num_rows in (1, 2, 33, MAX_ROWS):
        assert answers_right(channel, num_rows)


def test_bfloat16_rows_are_understood(channel: ExpertChannel) -> None:
    frame = make_frame(channel, 5)
    upper = (frame.rows.view(np.uint32) >> 16).astype(np.uint16)
    rounded = (upper.astype(np.uint32) << 16).view(np.float32)

    sums = sums_of(ask_host(channel, replace(frame, rows=upper)))

    assert np.array_equal(sums, expected_sums(replace(frame, rows=rounded)))


def test_answers_of_frames_in_flight_are_taken_in_any_order(host: FakeHost, channel: ExpertChannel) -> None:
    for turn in range(5):
        frames = [make_frame(channel, 2 + i, seed=10 * turn + i, layer=(0, 3)[i % 2]) for i in range(4)]
        for frame in frames:
            channel.send(frame)
        for i in (2, 0, 3, 1):
            sums = sums_of(channel.receive(frames[i].sequence, soon()))
            assert np.array_equal(sums, expected_sums(frames[i])), f"frame {i} of turn {turn}"


def test_frames_of_two_workers_join_one_batch_and_each_gets_its_own(host: FakeHost, channel: ExpertChannel) -> None:
    with connect_closing(host, "grpc") as second, connect_closing(host) as third:
        workers = (channel, second, third)
        frames = [make_frame(worker, 3 + i, seed=i) for i, worker in enumerate(workers)]
        with held_back(host):
            for worker, frame in zip(workers, frames, strict=True):
                worker.send(frame)
            num_streams = sum(worker.carrier == "grpc" for worker in workers)
            wait_until(lambda: len(host.submitted) == num_streams, "the streams' frames wait too")
        for worker, frame in zip(workers, frames, strict=True):
            assert np.array_equal(sums_of(worker.receive(frame.sequence, soon())), expected_sums(frame))
    assert host.backend.batches[1:] == [(3, 3 + 4 + 5)]


def test_frame_of_an_old_plan_is_refused_with_the_new_epoch(host: FakeHost, channel: ExpertChannel) -> None:
    host.pool.set_epochs(5, (5,))

    refusal = ask_host(channel, make_frame(channel))

    assert isinstance(refusal, RefusalFrame)
    assert (refusal.reason, refusal.epoch) == (RefusalReason.STALE_EPOCH, 5)
    frame = make_frame(channel, epoch=5)
    assert np.array_equal(sums_of(ask_host(channel, frame)), expected_sums(frame)), "the connection goes on"
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
    refusal = ask_host(channel, make_frame(channel, **changes))

    assert isinstance(refusal, RefusalFrame)
    assert refusal.reason is RefusalReason.DAMAGED
    assert words in refusal.message
    assert host.backend.batches == []
    assert answers_right(channel)


def test_damaged_frame_does_not_spoil_the_batch_it_would_have_joined(host: FakeHost, channel: ExpertChannel) -> None:
    with connect_closing(host) as other:
        good, bad = make_frame(channel), make_frame(other, expert_ids=np.full((3, TOP_K), 99))
        with held_back(host):
            other.send(bad)
            channel.send(good)
            wait_until(lambda: len(host.submitted) == (channel.carrier == "grpc"), "both wait")
        assert np.array_equal(sums_of(channel.receive(good.sequence, soon())), expected_sums(good))
        assert isinstance(other.receive(bad.sequence, soon()), RefusalFrame)


def test_host_that_cannot_compute_says_why_and_goes_on(host: FakeHost, channel: ExpertChannel) -> None:
    host.backend.fail = ExpertReadError("model.safetensors: shorter than its header says" + "!" * 10_000)

    refusal = ask_host(channel, make_frame(channel))

    assert isinstance(refusal, RefusalFrame)
    assert refusal.reason is RefusalReason.FAILED
    assert refusal.message.startswith("model.safetensors: shorter")
    host.backend.fail = None
    assert answers_right(channel)


def test_late_frame_is_refused(host: FakeHost, channel: ExpertChannel) -> None:
    frame = make_frame(channel, deadline_us=0)
    with held_back(host):
        channel.send(frame)
        wait_until(lambda: len(host.submitted) == (channel.carrier == "grpc"), "it arrived")
    refusal = channel.receive(frame.sequence, soon())

    assert isinstance(refusal, RefusalFrame)
    assert refusal.reason is RefusalReason.LATE


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
        answer = ask_host(channel, make_frame(channel))
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
            assert np.array_equal(sums_of(channel.receive(frame.sequence, soon(30))), expected_sums(frame))
        late = make_frame(channel)
        channel.send(late)
        assert channel.wait_for(late.sequence, soon(30))
        channel.abandon(late.sequence)
        wait_until(channel.settle, "the answer that nobody wants")
        stale = ask_host(channel, make_frame(channel, epoch=9))
        assert isinstance(stale, RefusalFrame)
        assert (stale.reason, stale.epoch) == (RefusalReason.STALE_EPOCH, 1)
        foreign = ask_host(channel, make_frame(channel, layer=1))
        assert isinstance(foreign, RefusalFrame)
        ray.kill(actor)
        # Ray kills by and by: a frame or two may still be answered.
        lost_within(10, lambda: [ask_host(channel, make_frame(channel)) for _ in range(1000)])
    finally:
        ray.shutdown()


def test_outlooks_arrive_beside_frames_and_end_with_the_connection(host: FakeHost, channel: ExpertChannel) -> None:
    if channel.carrier == "actor call":
        pytest.skip("the host behind it is no actor here")
    for number in range(3):
        channel.send_outlook(b"%d" % number)
        assert answers_right(channel, 2)

    wait_until(lambda: len(host.outlooks.said) == 3, "all are heard")
    assert [data for _, data in host.outlooks.said] == [b"0", b"1", b"2"]
    assert len({worker for worker, _ in host.outlooks.said}) == 1
    channel.close()
    wait_until(lambda: host.outlooks.gone == [host.outlooks.said[0][0]], "the worker is forgotten")
    channel.send_outlook(b"late")  # nobody is there, and nobody minds
