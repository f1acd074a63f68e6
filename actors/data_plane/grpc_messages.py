"""Frames and welcomes as protobuf messages, field by field, and back: what the gRPC stream carries."""

from __future__ import annotations

import struct
import zlib

import numpy as np

from actors.data_plane.channel import Welcome
from actors.data_plane.frames import (
    MAX_MESSAGE_BYTES,
    Answer,
    CombineFrame,
    DispatchFrame,
    FrameError,
    RefusalFrame,
    refusal_reason,
)
from cluster.rpc import expert_pb2 as pb

_DISPATCH_NUMBERS = struct.Struct("<QQIIIIIII")
_COMBINE_NUMBERS = struct.Struct("<QII")


def dispatch_message(frame: DispatchFrame, *, checked: bool = False) -> pb.DispatchFrame:
    """A dispatch frame to send. Args: checked: with a checksum."""
    is_bf16 = frame.rows.dtype == np.uint16
    message = pb.DispatchFrame(
        sequence=frame.sequence,
        step=frame.step,
        layer=frame.layer,
        micro_batch=frame.micro_batch,
        epoch=frame.epoch,
        deadline_us=frame.deadline_us,
        num_rows=len(frame.rows),
        top_k=frame.expert_ids.shape[1],
        row_type=pb.ROW_TYPE_BFLOAT16 if is_bf16 else pb.ROW_TYPE_FLOAT32,
        rows=frame.rows.tobytes(),
        expert_ids=frame.expert_ids.tobytes(),
        weights=frame.weights.tobytes(),
    )
    if checked:
        message.checksum = _dispatch_checksum(message)
    return message


def read_dispatch(frame: pb.DispatchFrame) -> DispatchFrame:
    """The dispatch frame of a message.

    Raises:
        FrameError: damaged, or its parts do not fit each other.
    """
    if frame.HasField("checksum") and frame.checksum != _dispatch_checksum(frame):
        raise FrameError("damaged frame: the checksum does not match")
    T, K = frame.num_rows, frame.top_k
    dtype = {pb.ROW_TYPE_BFLOAT16: np.dtype(np.uint16), pb.ROW_TYPE_FLOAT32: np.dtype(np.float32)}.get(frame.row_type)
    if dtype is None or not T or not K or len(frame.rows) % (T * dtype.itemsize) or not frame.rows:
        raise FrameError(f"dispatch frame of {T} rows, {K} choices, {len(frame.rows)} bytes of type {frame.row_type}")
    if len(frame.expert_ids) != T * K * 8 or len(frame.weights) != T * K * 4:
        raise FrameError(f"{len(frame.expert_ids)} bytes of ids and {len(frame.weights)} of weights for {T} x {K}")
    return DispatchFrame(
        sequence=frame.sequence,
        epoch=frame.epoch,
        step=frame.step,
        layer=frame.layer,
        micro_batch=frame.micro_batch,
        deadline_us=frame.deadline_us,
        rows=np.frombuffer(bytearray(frame.rows), dtype).reshape(T, -1),
        expert_ids=np.frombuffer(bytearray(frame.expert_ids), np.int64).reshape(T, K),
        weights=np.frombuffer(bytearray(frame.weights), np.float32).reshape(T, K),
    )


def answer_message(answer: Answer, *, checked: bool = False) -> pb.DispatchResponse:
    """An answer to send. Args: checked: with a checksum."""
    if isinstance(answer, CombineFrame):
        rows = answer.rows
        combine = pb.CombineFrame(
            sequence=answer.sequence,
            num_rows=len(rows),
            rows=rows.tobytes(),
            busy_us=answer.busy_us,
            stall_us=answer.stall_us,
            load_us=answer.load_us,
            load_cpu_us=answer.load_cpu_us,
        )
        if checked:
            combine.checksum = _combine_checksum(combine)
        return pb.DispatchResponse(combine=combine)
    refusal = pb.Refusal(
        sequence=answer.sequence,
        reason=pb.RefusalReason.ValueType(int(answer.reason)),
        epoch=answer.epoch,
        message=answer.message[:MAX_MESSAGE_BYTES],
    )
    return pb.DispatchResponse(refusal=refusal)


def read_answer(response: pb.DispatchResponse) -> Answer:
    """The answer of a message.

    Raises:
        FrameError: it is none, or its parts do not fit each other.
    """
    kind = response.WhichOneof("kind")
    if kind == "combine":
        combine = response.combine
        if combine.HasField("checksum") and combine.checksum != _combine_checksum(combine):
            raise FrameError("damaged answer: the checksum does not match")
        if not combine.num_rows or len(combine.rows) % (4 * combine.num_rows):
            raise FrameError(f"{len(combine.rows)} bytes for {combine.num_rows} rows")
        rows = np.frombuffer(bytearray(combine.rows), np.float32).reshape(combine.num_rows, -1)
        return CombineFrame(
            sequence=combine.sequence,
            rows=rows,
            busy_us=combine.busy_us,
            stall_us=combine.stall_us,
            load_us=combine.load_us,
            load_cpu_us=combine.load_cpu_us,
        )
    if kind != "refusal":
        raise FrameError(f"a message of kind {kind} where an answer belongs")
    refusal = response.refusal
    reason = refusal_reason(refusal.reason)
    return RefusalFrame(sequence=refusal.sequence, reason=reason, epoch=refusal.epoch, message=refusal.message)


def welcome_message(welcome: Welcome, proof: bytes) -> pb.DispatchResponse:
    """A welcome to send. Args: proof: that this is the host."""
    owned = [pb.OwnedExperts(layer=layer, experts=experts) for layer, experts in welcome.owned.items()]
    message = pb.HostWelcome(
        host_id=welcome.host_id,
        epoch=welcome.epoch,
        num_experts=welcome.num_experts,
        owned=owned,
        proof=proof,
        num_slots=welcome.num_slots,
        gives_way=welcome.gives_way,
    )
    return pb.DispatchResponse(welcome=message)


def read_welcome(response: pb.DispatchResponse) -> tuple[Welcome, bytes]:
    """The welcome that follows a hello, and its proof. Raises FrameError if something else does."""
    if response.WhichOneof("kind") != "welcome":
        raise FrameError("the host's second message is no welcome")
    welcome = response.welcome
    owned = {entry.layer: tuple(entry.experts) for entry in welcome.owned}
    read = Welcome(
        host_id=welcome.host_id,
        epoch=welcome.epoch,
        num_experts=welcome.num_experts,
        owned=owned,
        num_slots=welcome.num_slots,
        gives_way=welcome.gives_way,
    )
    return read, welcome.proof


def read_challenge(response: pb.DispatchResponse) -> bytes:
    """The nonce that a stream begins with. Raises FrameError if it begins with something else."""
    if response.WhichOneof("kind") != "challenge":
        raise FrameError("the host's first message is no challenge")
    return response.challenge.nonce


def _dispatch_checksum(frame: pb.DispatchFrame) -> int:
    numbers = (frame.sequence, frame.step, frame.layer, frame.micro_batch, frame.epoch, frame.deadline_us)
    shapes = (frame.num_rows, frame.top_k, frame.row_type)
    crc = zlib.crc32(_DISPATCH_NUMBERS.pack(*numbers, *shapes))
    for array in (frame.rows, frame.expert_ids, frame.weights):
        crc = zlib.crc32(array, crc)
    return crc


def _combine_checksum(frame: pb.CombineFrame) -> int:
    return zlib.crc32(frame.rows, zlib.crc32(_COMBINE_NUMBERS.pack(frame.sequence, frame.num_rows, frame.busy_us)))
