"""Frames of the token stream: what goes in comes out, and nothing else than such frames is taken."""

from __future__ import annotations

import contextlib
import math
from typing import Any

import msgpack
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import (
    DeadlineExceeded,
    ExpertReadError,
    InvalidOutput,
    InvalidRequest,
    MoesaicError,
    Overloaded,
    Unavailable,
    WorkerLost,
)
from cluster.network.unsent_bytes import UnsentBytes
from cluster.token_stream.codec import CodecError, decode_frame, encode_frame
from cluster.token_stream.progress import Progress
from cluster.types import FinishReason, RequestId, TokenChunk, TokenLogprob

ids = st.integers(0, 2**31 - 1)
floats = st.floats(allow_nan=False)
logprobs = st.builds(
    TokenLogprob,
    ids,
    floats,
    st.lists(st.tuples(ids, floats), max_size=3).map(tuple),
    st.none() | ids,
)
chunks = st.builds(
    TokenChunk,
    token_ids=st.lists(ids, max_size=4).map(tuple),
    logprobs=st.none() | st.lists(logprobs, max_size=3).map(tuple),
    finish_reason=st.none() | st.sampled_from(FinishReason),
    num_cached_tokens=ids,
    queued_s=st.floats(0, 1e9),
    prompt_logprobs=st.none() | st.lists(logprobs, max_size=3).map(tuple),
)
durations = st.floats(0, 1e9)
progresses = st.builds(Progress, stalled_s=durations, allowed_s=durations, silence_s=durations)
request_ids = st.text(max_size=40, alphabet=st.characters(codec="utf-8")).map(RequestId)


@given(progresses, st.lists(st.tuples(request_ids, chunks), max_size=4))
def test_chunks_come_out_as_they_went_in(progress, items):
    assert decode_frame(encode_frame(progress, items)) == (progress, items)


@pytest.mark.parametrize(
    "error",
    [
        MoesaicError("plain"),
        InvalidOutput("not finite from expert 3 of layer 1 on"),
        InvalidRequest("too large", param="top_k", code="too_large"),
        Overloaded("full"),
        Unavailable("gone"),
        WorkerLost("lost"),
        DeadlineExceeded("late"),
        ExpertReadError("shard 2 is cut"),
    ],
)
def test_errors_keep_their_class_and_what_clients_are_told(error):
    if isinstance(error, Unavailable):
        error.retry_after_s = 7.0
    if isinstance(error, ExpertReadError):
        error.expert = (3, 5)
    _, [(_, read)] = decode_frame(encode_frame(Progress(), [(RequestId("a"), error)]))
    assert type(read) is type(error)
    assert read.__dict__ == error.__dict__
    assert str(read) == str(error)


def test_error_of_a_class_that_only_one_side_knows_arrives_as_its_parent():
    class OfThisModule(Overloaded):
        pass

    _, [(_, read)] = decode_frame(encode_frame(Progress(), [(RequestId("a"), OfThisModule("x"))]))
    assert type(read) is Overloaded


def frame(*item: Any, life: Any = (0.0, 2.0, 2.0), version: Any = 1) -> bytes:
    packed = msgpack.packb((version, life, [item] if item else []))
    assert packed is not None
    return packed


BEFORE = [0, 0.0]
GOOD = ("a", [1], None, BEFORE, None, None)


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"\xc1",
        frame() + b"\0",
        frame()[:-1],
        b"\x91" * 3000,
        frame(version=2),
        frame(version=True),
        frame(life=(0.0, 2.0)),
        frame(life=(0.0, 2.0, math.nan)),
        frame(life=(-1.0, 2.0, 2.0)),
        frame(life=(math.inf, 2.0, 2.0)),
        frame(life="abc"),
        frame(1, *GOOD[1:]),
        frame("a" * 513, *GOOD[1:]),
        frame("a", [1.0], *GOOD[2:]),
        frame("a", [True], *GOOD[2:]),
        frame("a", [-1], *GOOD[2:]),
        frame("a", [2**31], *GOOD[2:]),
        frame("a", "12", *GOOD[2:]),
        frame("a", {"1": 2}, *GOOD[2:]),
        frame("a", [1], "finished", BEFORE, None, None),
        frame("a", [1], 5, BEFORE, None, None),
        frame("a", [1], None, None, None, None),
        frame("a", [1], None, 0, None, None),
        frame("a", [1], None, [None, 0.0], None, None),
        frame("a", [1], None, [0, -1.0], None, None),
        frame("a", [1], None, BEFORE, [[1, -0.5, None, [2], []]], None),
        frame("a", [1], None, BEFORE, [[1, "x", None, [], []]], None),
        frame("a", [1], None, BEFORE, None, 7),
        frame("a", [1], None, BEFORE, None),
        frame("a", "SystemExit", "m", None, None, None, None),
        frame("a", "dataclass", "m", None, None, None, None),
        frame("a", "Overloaded", 5, None, None, None, None),
        frame("a", "Overloaded", "m", None, None, -1.0, None),
        frame("a", "Overloaded", "m" * 70_000, None, None, None, None),
        frame("a", "ExpertReadError", "m", None, None, None, [1]),
    ],
)
def test_anything_else_is_refused_with_a_reason(body):
    with pytest.raises(CodecError):
        decode_frame(body)


@given(st.binary(max_size=200))
def test_random_bytes_are_refused_or_are_a_frame(body):
    with contextlib.suppress(CodecError):
        decode_frame(body)


@given(st.data())
def test_a_damaged_frame_is_refused_or_is_a_frame(data):
    body = bytearray(encode_frame(Progress(), [(RequestId("a"), TokenChunk(token_ids=(1, 2)))]))
    body[data.draw(st.integers(0, len(body) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(CodecError):
        decode_frame(bytes(body))


def test_peer_that_reads_slowly_is_well_and_one_that_stands_still_is_not():
    unsent = UnsentBytes(max_bytes=1000, max_still_s=10)
    unsent.note_written(900)
    assert [unsent.problem(900 - 10 * i, now_s=5.0 * i) for i in range(8)] == [None] * 8
    assert unsent.problem(830, now_s=44.0) is None
    assert "read nothing for" in str(unsent.problem(830, now_s=50.0))
    unsent.note_written(100)
    assert unsent.problem(0, now_s=51.0) is None
    assert unsent.problem(0, now_s=99.0) is None
    unsent.note_written(2000)
    assert "1001 bytes wait" in str(unsent.problem(1001, now_s=100.0))
