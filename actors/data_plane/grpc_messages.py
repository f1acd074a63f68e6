"""Frames and welcomes as protobuf messages, field by field, and back: what the gRPC stream carries."""

from __future__ import annotations

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


def dispatch_message(frame: DispatchFrame) -> pb.DispatchFrame:
    """A dispatch frame to send."""
    is_bf16 = frame.rows.dtype == np.uint16
    return pb.DispatchFrame(
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


def read_dispatch(frame: pb.DispatchFrame) -> DispatchFrame:
    """The dispatch frame of a message.

    Raises:
        FrameError: its parts do not fit each other.
    """
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


def answer_message(answer: Answer) -> pb.DispatchResponse:
    """An answer to send."""
    if isinstance(answer, CombineFrame):
        rows = answer.rows
        combine = pb.CombineFrame(
            sequence=answer.sequence, num_rows=len(rows), rows=rows.tobytes(), busy_us=answer.busy_us
        )
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
        if not combine.num_rows or len(combine.rows) % (4 * combine.num_rows):
            raise FrameError(f"{len(combine.rows)} bytes for {combine.num_rows} rows")
        rows = np.frombuffer(bytearray(combine.rows), np.float32).reshape(combine.num_rows, -1)
        return CombineFrame(sequence=combine.sequence, rows=rows, busy_us=combine.busy_us)
    if kind != "refusal":
        raise FrameError(f"a message of kind {kind} where an answer belongs")
    refusal = response.refusal
    reason = refusal_reason(refusal.reason)
    return RefusalFrame(sequence=refusal.sequence, reason=reason, epoch=refusal.epoch, message=refusal.message)


def welcome_message(welcome: Welcome) -> pb.HostWelcome:
    """A welcome to send."""
    owned = [pb.OwnedExperts(layer=layer, experts=experts) for layer, experts in welcome.owned.items()]
    return pb.HostWelcome(host_id=welcome.host_id, epoch=welcome.epoch, num_experts=welcome.num_experts, owned=owned)


def read_welcome(response: pb.DispatchResponse) -> Welcome:
    """The welcome that a stream begins with. Raises FrameError if it begins with something else."""
    if response.WhichOneof("kind") != "welcome":
        raise FrameError("the host's first message is no welcome")
    welcome = response.welcome
    owned = {entry.layer: tuple(entry.experts) for entry in welcome.owned}
    return Welcome(host_id=welcome.host_id, epoch=welcome.epoch, num_experts=welcome.num_experts, owned=owned)
