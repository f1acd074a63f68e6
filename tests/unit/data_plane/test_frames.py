"""Frames survive the way there and back; anything else is refused, never read past its end."""

from __future__ import annotations

import struct
import zlib
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings

from actors.data_plane.frames import (
    HEADER_BYTES,
    MAX_FRAME_BYTES,
    MAX_MESSAGE_BYTES,
    CombineFrame,
    DispatchFrame,
    FrameError,
    RefusalFrame,
    RefusalReason,
    combine_bytes,
    decode_answer,
    decode_dispatch,
    dispatch_bytes,
    encode_answer,
    encode_dispatch,
)

# Offsets and formats of the header's fields, written down a second time: a change of the wire format must be meant.
_FIELDS = {
    "version": (4, "<B"), "kind": (5, "<B"), "epoch": (8, "<I"), "layer": (12, "<I"), "T": (20, "<I"),
    "K": (24, "<I"), "D": (28, "<I"), "element": (32, "<I"), "length": (60, "<I"),
}  # fmt: skip
_CHECKED_HEADER = 64
_CHECKSUM_END = 68


def _frame(num_rows: int = 3, dim: int = 5, top_k: int = 2, dtype: type = np.float32, seed: int = 0) -> DispatchFrame:
    generator = np.random.default_rng(seed)
    rows = generator.integers(0, 2**16, (num_rows, dim)).astype(dtype)
    return DispatchFrame(
        sequence=2**40 + seed,
        epoch=7,
        step=2**33,
        layer=60,
        micro_batch=1,
        deadline_us=10_000_000,
        rows=rows,
        expert_ids=generator.integers(0, 256, (num_rows, top_k)),
        weights=generator.random((num_rows, top_k), dtype=np.float32),
    )


def _encoded(frame: DispatchFrame, *, checked: bool = False, spare: int = 0) -> bytearray:
    (T, D), K = frame.rows.shape, frame.expert_ids.shape[1]
    size = dispatch_bytes(T, D, K, frame.rows.itemsize)
    buffer = bytearray(b"\xee" * (size + spare))
    assert encode_dispatch(frame, memoryview(buffer), checked=checked) == size
    return buffer


def _forged(buffer: bytearray, **values: int) -> bytearray:
    """A frame whose header says something else, with a right checksum: a peer with a defect."""
    forged = bytearray(buffer)
    for name, value in values.items():
        offset, kind = _FIELDS[name]
        struct.pack_into(kind, forged, offset, value)
    struct.pack_into("<I", forged, _CHECKED_HEADER, zlib.crc32(forged[:_CHECKED_HEADER]))
    return forged


def _same(frame: DispatchFrame, other: DispatchFrame) -> bool:
    arrays = ("rows", "expert_ids", "weights")
    names = ("sequence", "epoch", "step", "layer", "micro_batch", "deadline_us")
    return all(getattr(frame, name) == getattr(other, name) for name in names) and all(
        getattr(frame, name).dtype == getattr(other, name).dtype
        and np.array_equal(getattr(frame, name), getattr(other, name))
        for name in arrays
    )


@settings(max_examples=60, deadline=None)
@given(
    num_rows=st.integers(1, 20),
    dim=st.integers(1, 70),
    top_k=st.integers(1, 9),
    dtype=st.sampled_from([np.float32, np.uint16]),
    checked=st.booleans(),
    spare=st.integers(0, 100),
    seed=st.integers(0, 1000),
)
def test_dispatch_frames_come_back_as_they_went(
    num_rows: int, dim: int, top_k: int, dtype: type, checked: bool, spare: int, seed: int
) -> None:
    frame = _frame(num_rows, dim, top_k, dtype, seed)
    buffer = _encoded(frame, checked=checked, spare=spare)

    decoded = decode_dispatch(memoryview(buffer))

    assert _same(frame, decoded)
    base = np.frombuffer(buffer, np.uint8).ctypes.data
    for array in (decoded.rows, decoded.expert_ids, decoded.weights):
        assert (array.ctypes.data - base) % 64 == 0, "a kernel reads it where it lies"
        assert base <= array.ctypes.data
        assert array.ctypes.data + array.nbytes <= base + len(buffer) - spare


@settings(max_examples=30, deadline=None)
@given(num_rows=st.integers(1, 20), dim=st.integers(1, 70), checked=st.booleans(), busy_us=st.integers(0, 2**32 - 1))
def test_partial_sums_come_back_as_they_went(num_rows: int, dim: int, checked: bool, busy_us: int) -> None:
    rows = np.random.default_rng(0).standard_normal((num_rows, dim), dtype=np.float32)
    buffer = memoryview(bytearray(combine_bytes(num_rows, dim)))

    assert encode_answer(CombineFrame(sequence=9, rows=rows, busy_us=busy_us), buffer, checked=checked) == len(buffer)
    decoded = decode_answer(buffer)

    assert isinstance(decoded, CombineFrame)
    assert (decoded.sequence, decoded.busy_us) == (9, busy_us)
    assert np.array_equal(decoded.rows, rows)


@given(reason=st.sampled_from(RefusalReason), message=st.text(), epoch=st.integers(0, 2**32 - 1))
def test_refusals_come_back_as_they_went(reason: RefusalReason, message: str, epoch: int) -> None:
    refusal = RefusalFrame(sequence=3, reason=reason, epoch=epoch, message=message)
    buffer = memoryview(bytearray(4096))

    decoded = decode_answer(buffer[: encode_answer(refusal, buffer)])

    assert isinstance(decoded, RefusalFrame)
    assert (decoded.sequence, decoded.reason, decoded.epoch) == (3, reason, epoch)
    assert decoded.message == (message or " ")


def test_text_of_a_refusal_is_bounded_and_never_breaks_it() -> None:
    for message in ("x" * 10**6, "\U0001f389" * 5000, "\ud800 broken"):
        refusal = RefusalFrame(sequence=1, reason=RefusalReason.FAILED, epoch=1, message=message)
        buffer = memoryview(bytearray(HEADER_BYTES + MAX_MESSAGE_BYTES))

        decoded = decode_answer(buffer[: encode_answer(refusal, buffer)])

        assert isinstance(decoded, RefusalFrame)
        assert decoded.message[0] == message[0].encode(errors="replace").decode()
        assert len(decoded.message) <= MAX_MESSAGE_BYTES


@pytest.mark.parametrize("at", range(_CHECKSUM_END))
def test_every_changed_byte_of_the_header_is_refused(at: int) -> None:
    buffer = _encoded(_frame())
    for bits in (1, 0x80, 0xFF):
        changed = bytearray(buffer)
        changed[at] ^= bits
        with pytest.raises(FrameError):
            decode_dispatch(memoryview(changed))
        with pytest.raises(FrameError):
            decode_answer(memoryview(changed))


def test_bytes_between_header_and_arrays_mean_nothing() -> None:
    frame = _frame()
    buffer = _encoded(frame, checked=True)
    buffer[_CHECKSUM_END:HEADER_BYTES] = b"?" * (HEADER_BYTES - _CHECKSUM_END)

    assert _same(frame, decode_dispatch(memoryview(buffer)))


@settings(max_examples=40, deadline=None)
@given(data=st.data())
def test_checked_frames_refuse_any_changed_byte_of_their_arrays(data: st.DataObject) -> None:
    buffer = _encoded(_frame(), checked=True)
    at = data.draw(st.integers(HEADER_BYTES, len(buffer) - 1))
    buffer[at] ^= data.draw(st.integers(1, 255))

    with pytest.raises(FrameError, match="arrays' checksum"):
        decode_dispatch(memoryview(buffer))


@given(st.binary(max_size=400))
def test_foreign_bytes_are_refused(data: bytes) -> None:
    for decode in (decode_dispatch, decode_answer):
        with pytest.raises(FrameError):
            decode(memoryview(bytearray(data)))


@pytest.mark.parametrize("checked", [False, True])
def test_frame_cut_anywhere_is_refused(checked: bool) -> None:
    buffer = memoryview(_encoded(_frame(), checked=checked))
    for length in range(len(buffer)):
        with pytest.raises(FrameError):
            decode_dispatch(buffer[:length])


@settings(max_examples=200, deadline=None)
@given(
    values=st.fixed_dictionaries(
        {},
        optional={name: st.one_of(st.integers(0, 9), st.integers(0, 2**32 - 1)) for name in ("T", "K", "D", "length")},
    ),
    element=st.integers(0, 9),
    kind=st.integers(0, 9),
)
def test_header_that_lies_about_sizes_is_refused_or_stays_inside(
    values: dict[str, int], element: int, kind: int
) -> None:
    buffer = _forged(_encoded(_frame()), element=element, kind=kind, **values)
    base = np.frombuffer(buffer, np.uint8).ctypes.data
    for decode in (decode_dispatch, decode_answer):
        try:
            decoded: Any = decode(memoryview(buffer))
        except FrameError:
            continue
        for name in ("rows", "expert_ids", "weights"):
            array = getattr(decoded, name, None)
            if array is not None:
                assert base <= array.ctypes.data
                assert array.ctypes.data + array.nbytes <= base + len(buffer)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"version": 3}, "version 3"),
        ({"length": MAX_FRAME_BYTES + 1}, str(MAX_FRAME_BYTES)),
        ({"length": HEADER_BYTES - 1}, "are possible"),
        ({"T": 0}, "0 rows"),
        ({"K": 0}, "0 choices"),
        ({"D": 0}, "x 0"),
        ({"element": 8}, "8 bytes an element"),
        ({"T": 2**32 - 1, "D": 2**32 - 1}, "need a frame of"),
        ({"kind": 9}, "kind 9"),
    ],
)
def test_impossible_headers_are_named(change: dict[str, int], words: str) -> None:
    with pytest.raises(FrameError, match=words):
        decode_dispatch(memoryview(_forged(_encoded(_frame()), **change)))


def test_unknown_reason_of_a_refusal_is_a_damaged_answer() -> None:
    buffer = bytearray(4096)
    encode_answer(RefusalFrame(sequence=1, reason=RefusalReason.LATE, epoch=1, message="m"), memoryview(buffer))

    with pytest.raises(FrameError, match="reason 77"):
        decode_answer(memoryview(_forged(buffer, layer=77)))


def test_frame_that_does_not_fit_is_refused_before_anything_is_written_past_the_end() -> None:
    frame = _frame(num_rows=8)
    whole = bytearray(b"\xee" * 4096)
    size = dispatch_bytes(8, 5, 2, 4)
    for room in range(0, size, 32):
        with pytest.raises(FrameError, match="does not fit"):
            encode_dispatch(frame, memoryview(whole)[:room])
        assert whole[room:] == b"\xee" * (4096 - room)


def test_a_step_of_the_widest_model_fits() -> None:
    assert max(dispatch_bytes(4096, 7168, 8, 4), combine_bytes(4096, 7168)) < MAX_FRAME_BYTES
