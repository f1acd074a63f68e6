"""What crosses between an attention worker and an expert host, whatever carries it.

A dispatch frame has each token row once per host, with the gate's choices on that host; the answer is a combine
frame with one float32 partial sum per row, or a refusal. Knows bytes and shapes; knows no carrier and no experts.

Layout: a fixed header (little endian) with a checksum of its own, then the arrays one after the other, each at a
multiple of 64 bytes, so that a kernel may read them where they lie.

Shapes: T rows, D model dim, K choices per row (top-k).
"""

from __future__ import annotations

import struct
import zlib
from dataclasses import dataclass
from enum import IntEnum

import numpy as np

from cluster.errors import MoesaicError

MAX_FRAME_BYTES = 256 * 2**20

_MAGIC = b"MSIC"
_VERSION = 2
_ALIGN = 64
# magic, version, kind, flags; epoch, layer, micro-batch, T, K, D, element bytes; sequence, step; deadline or busy us,
# checksum of the arrays, length
_HEADER = struct.Struct("<4sBBHIIIIIIIQQIII")
_CRC = struct.Struct("<I")
HEADER_BYTES = 128
MAX_MESSAGE_BYTES = 1024  # of a refusal; fits the smallest answer area
_DISPATCH, _COMBINE, _REFUSAL = 1, 2, 3
_CHECKED = 1
_MOST = 2**32 - 1

Buffer = memoryview | bytearray


class FrameError(MoesaicError):
    """Bytes that are no frame, or a damaged one; says what is wrong with them."""


class RefusalReason(IntEnum):
    """Why a host did not compute a frame."""

    STALE_EPOCH = 1
    LATE = 2
    DAMAGED = 3
    FAILED = 4


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DispatchFrame:
    """Rows for the experts of one host."""

    sequence: int  # of the connection; comes back in the answer
    epoch: int  # plan epoch that the worker routed by
    step: int
    layer: int
    micro_batch: int
    deadline_us: int  # from arrival; a later answer is worth nothing
    rows: np.ndarray  # [T, D] float32, or bfloat16 as uint16
    expert_ids: np.ndarray  # [T, K] int64; num_experts where the choice is not this host's
    weights: np.ndarray  # [T, K] float32; 0 where the choice is not this host's


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CombineFrame:
    """Partial sums of one dispatch frame."""

    sequence: int
    rows: np.ndarray  # [T, D] float32
    busy_us: int  # time that the host computed
    stall_us: int = 0  # of it, that it waited for experts
    load_us: int = 0  # that it takes the host to load an expert, on average; 0: it loaded none yet
    load_cpu_us: int = 0  # processor time that takes of the host


@dataclass(frozen=True, slots=True, kw_only=True)
class RefusalFrame:
    """A dispatch frame was not computed; `epoch` is the host's."""

    sequence: int
    reason: RefusalReason
    epoch: int
    message: str


Answer = CombineFrame | RefusalFrame


def dispatch_bytes(num_rows: int, dim: int, top_k: int, element_bytes: int) -> int:
    """Bytes of a dispatch frame."""
    rows, ids, weights = num_rows * dim * element_bytes, num_rows * top_k * 8, num_rows * top_k * 4
    return HEADER_BYTES + _aligned(rows) + _aligned(ids) + _aligned(weights)


def combine_bytes(num_rows: int, dim: int) -> int:
    """Bytes of a combine frame."""
    return HEADER_BYTES + _aligned(num_rows * dim * 4)


def encode_dispatch(frame: DispatchFrame, buffer: Buffer, *, checked: bool = False) -> int:
    """Write a frame to the start of `buffer`; its length. Args: checked: with a checksum of the arrays."""
    (T, D), K = frame.rows.shape, frame.expert_ids.shape[1]
    end = _put(buffer, (frame.rows, frame.expert_ids, frame.weights))
    fields = (frame.epoch, frame.layer, frame.micro_batch, T, K, D, frame.rows.itemsize)
    return _seal(buffer, end, _DISPATCH, fields, frame.sequence, frame.step, frame.deadline_us, checked=checked)


def decode_dispatch(buffer: Buffer) -> DispatchFrame:
    """The frame at the start of `buffer`; its arrays are views of it.

    Raises:
        FrameError: foreign, damaged, cut or too large.
    """
    kind, header, end = _open(buffer)
    if kind != _DISPATCH:
        raise FrameError(f"frame kind {kind} where a dispatch frame ({_DISPATCH}) belongs")
    epoch, layer, micro_batch, T, K, D, element, sequence, step, deadline_us = header
    if not (T and K and D) or element not in (2, 4):
        raise FrameError(f"dispatch frame of {T} rows x {D}, {K} choices, {element} bytes an element")
    _check_length(end, dispatch_bytes(T, D, K, element))
    rows_at = HEADER_BYTES
    ids_at = rows_at + _aligned(T * D * element)
    weights_at = ids_at + _aligned(T * K * 8)
    dtype = np.uint16 if element == 2 else np.float32
    return DispatchFrame(
        sequence=sequence,
        epoch=epoch,
        step=step,
        layer=layer,
        micro_batch=micro_batch,
        deadline_us=deadline_us,
        rows=np.frombuffer(buffer, dtype, T * D, rows_at).reshape(T, D),
        expert_ids=np.frombuffer(buffer, np.int64, T * K, ids_at).reshape(T, K),
        weights=np.frombuffer(buffer, np.float32, T * K, weights_at).reshape(T, K),
    )


def encode_answer(answer: Answer, buffer: Buffer, *, checked: bool = False) -> int:
    """Write a combine or refusal frame to the start of `buffer`; its length."""
    if isinstance(answer, CombineFrame):
        T, D = answer.rows.shape
        end = _put(buffer, (answer.rows,))
        times = (min(time_us, _MOST) for time_us in (answer.stall_us, answer.load_us, answer.load_cpu_us))
        fields = (*times, T, 0, D, 4)
        return _seal(buffer, end, _COMBINE, fields, answer.sequence, 0, answer.busy_us, checked=checked)
    text = np.frombuffer(answer.message.encode(errors="replace")[:MAX_MESSAGE_BYTES] or b" ", np.uint8)
    end = _put(buffer, (text,))
    fields = (answer.epoch, int(answer.reason), 0, len(text), 0, 1, 1)
    return _seal(buffer, end, _REFUSAL, fields, answer.sequence, 0, 0, checked=checked)


def decode_answer(buffer: Buffer) -> Answer:
    """The combine or refusal frame at the start of `buffer`; its rows are a view of it.

    Raises:
        FrameError: foreign, damaged, cut or too large.
    """
    kind, header, end = _open(buffer)
    epoch, layer, load_cpu_us, T, _, D, _, sequence, _, busy_us = header  # of a combine frame the first three are times
    if kind == _COMBINE:
        _check_length(end, combine_bytes(T, D))
        rows = np.frombuffer(buffer, np.float32, T * D, HEADER_BYTES).reshape(T, D)
        times = {"busy_us": busy_us, "stall_us": epoch, "load_us": layer, "load_cpu_us": load_cpu_us}
        return CombineFrame(sequence=sequence, rows=rows, **times)
    if kind != _REFUSAL:
        raise FrameError(f"frame kind {kind} where an answer ({_COMBINE} or {_REFUSAL}) belongs")
    if T > MAX_MESSAGE_BYTES:
        raise FrameError(f"a refusal of {T} bytes; {MAX_MESSAGE_BYTES} are possible")
    _check_length(end, HEADER_BYTES + _aligned(T))
    message = bytes(buffer[HEADER_BYTES : HEADER_BYTES + T]).decode(errors="replace")
    return RefusalFrame(sequence=sequence, reason=refusal_reason(layer), epoch=epoch, message=message)


def refusal_reason(value: int) -> RefusalReason:
    """The reason with this number. Raises FrameError if there is none."""
    try:
        return RefusalReason(value)
    except ValueError as error:
        raise FrameError(f"refused for reason {value}, which this release does not know") from error


def _aligned(num_bytes: int) -> int:
    return -(-num_bytes // _ALIGN) * _ALIGN


def _put(buffer: Buffer, arrays: tuple[np.ndarray, ...]) -> int:
    at = HEADER_BYTES
    for array in arrays:
        end = at + array.nbytes
        if end > len(buffer):
            raise FrameError(f"a frame of {end} bytes or more does not fit {len(buffer)}")
        np.frombuffer(buffer, array.dtype, array.size, at)[:] = array.reshape(-1)  # type: ignore[index]
        at += _aligned(array.nbytes)
    return at


def _seal(
    buffer: Buffer,
    end: int,
    kind: int,
    fields: tuple[int, ...],
    sequence: int,
    step: int,
    time_us: int,
    *,
    checked: bool,
) -> int:
    payload = zlib.crc32(buffer[HEADER_BYTES:end]) if checked else 0
    flags = _CHECKED if checked else 0
    _HEADER.pack_into(buffer, 0, _MAGIC, _VERSION, kind, flags, *fields, sequence, step, time_us, payload, end)
    _CRC.pack_into(buffer, _HEADER.size, zlib.crc32(buffer[: _HEADER.size]))
    return end


def _open(buffer: Buffer) -> tuple[int, tuple[int, ...], int]:
    if len(buffer) < HEADER_BYTES:
        raise FrameError(f"{len(buffer)} bytes are too short for a frame")
    magic, version, kind, flags, *header, payload, end = _HEADER.unpack_from(buffer)
    if magic != _MAGIC:
        raise FrameError(f"foreign frame: it starts with {magic!r}")
    if version != _VERSION:
        raise FrameError(f"frame version {version}; this process speaks {_VERSION}: worker and host differ in release")
    if _CRC.unpack_from(buffer, _HEADER.size)[0] != zlib.crc32(buffer[: _HEADER.size]):
        raise FrameError("damaged frame: the header's checksum does not match")
    if not HEADER_BYTES <= end <= MAX_FRAME_BYTES:
        raise FrameError(f"frame of {end} bytes; {HEADER_BYTES} to {MAX_FRAME_BYTES} are possible")
    if end > len(buffer):
        raise FrameError(f"cut frame: {len(buffer)} of {end} bytes")
    if flags & _CHECKED and zlib.crc32(buffer[HEADER_BYTES:end]) != payload:
        raise FrameError("damaged frame: the arrays' checksum does not match")
    return kind, tuple(header), end


def _check_length(end: int, needed: int) -> None:
    if needed != end:
        raise FrameError(f"the arrays that the header describes need a frame of {needed} bytes; it has {end}")
