"""Errors as gRPC statuses: code and text, and google.rpc details that a client can act on.

Knows the error table and the sizes that trailers may have; knows no server.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from google.protobuf.any_pb2 import Any as AnyMessage
from google.protobuf.duration_pb2 import Duration
from google.protobuf.message import Message
from google.rpc import code_pb2  # pyright: ignore[reportMissingTypeStubs]
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from cluster.errors import InvalidRequest, MoesaicError, Overloaded, Unavailable, codes_of

DOMAIN = "moesaic"

# A trailer holds 8 KB. The text is in it twice: percent-encoded (three characters a byte at worst) and, with the
# details, in base64.
_MAX_TEXT_BYTES = 1024
_MAX_VIOLATIONS = 5
_MAX_VIOLATION_BYTES = 256
_MAX_FIELD_BYTES = 128


@dataclass(frozen=True, slots=True)
class FieldViolation:
    """One field of a request message, by its path there, and what is wrong with it."""

    field: str
    description: str


class InvalidFields(InvalidRequest):
    """Several fields are malformed or out of range."""

    def __init__(self, violations: Sequence[FieldViolation]) -> None:
        """`violations` has at least one."""
        message = "; ".join(f"{violation.field}: {violation.description}" for violation in violations)
        super().__init__(message, param=violations[0].field)
        self.violations = tuple(violations)


def status_of(error: BaseException, *, field_of: Callable[[str], str] = str) -> Status:
    """The google.rpc.Status of an error. What is not ours is not explained to clients.

    Args:
        field_of: the path in the request message of what `InvalidRequest.param` names.
    """
    is_ours = isinstance(error, MoesaicError)
    message = error.message if is_ours else "internal error; the server's log has the details"
    text = _cut(message, _MAX_TEXT_BYTES)
    details: list[Message] = [ErrorInfo(reason=_reason(error), domain=DOMAIN, metadata=_metadata(error))]
    if isinstance(error, InvalidRequest):
        details.append(BadRequest(field_violations=_violations(error, field_of)))
    if isinstance(error, Overloaded | Unavailable):
        delay = Duration()
        delay.FromMilliseconds(int(error.retry_after_s * 1000))
        details.append(RetryInfo(retry_delay=delay))
    status = Status(code=code_pb2.Code.Value(codes_of(error).grpc), message=text)
    for detail in details:
        packed = AnyMessage()
        packed.Pack(detail)
        status.details.append(packed)
    return status


def _reason(error: BaseException) -> str:
    """The error's class as google.rpc wants it: `ContextTooLong` is CONTEXT_TOO_LONG."""
    name = type(error).__name__ if isinstance(error, MoesaicError) else "InternalError"
    name = "InvalidRequest" if isinstance(error, InvalidFields) else name
    return re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).upper()


def _metadata(error: BaseException) -> dict[str, str]:
    code = error.code if isinstance(error, MoesaicError) else None
    return {} if code is None else {"code": _cut(code, _MAX_FIELD_BYTES)}


def _violations(error: InvalidRequest, field_of: Callable[[str], str]) -> list[BadRequest.FieldViolation]:
    if isinstance(error, InvalidFields):
        found = error.violations
    elif error.param is not None:
        found = (FieldViolation(field_of(error.param), error.message),)
    else:
        found = ()
    return [
        BadRequest.FieldViolation(
            field=_cut(violation.field, _MAX_FIELD_BYTES),
            description=_cut(violation.description, _MAX_VIOLATION_BYTES),
        )
        for violation in found[:_MAX_VIOLATIONS]
    ]


def _cut(text: str, max_bytes: int) -> str:
    """At most `max_bytes` of UTF-8, ending with dots where something was cut."""
    raw = text.encode(errors="replace")
    return text if len(raw) <= max_bytes else raw[: max_bytes - 3].decode(errors="ignore") + "..."
