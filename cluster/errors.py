"""The exception tree and the one table that maps it to HTTP codes, gRPC statuses and retries.

MoesaicError
 |- InvalidRequest        the caller's fault                         400
 |   |- ContextTooLong    prompt (+ max_tokens) exceeds the context  400
 |   |- BodyTooLarge      the request body exceeds its bound         413
 |   `- UnsupportedEncoding  the body is compressed in another way   415
 |- AuthenticationFailed  missing or wrong API key                   401
 |- PermissionDenied      a client's key where an operator's belongs 403
 |- ModelNotFound         the model named is not served              404
 |- NothingToChange       what is to be changed is not there         409
 |- Overloaded            the queue is full                          429  retry
 |- Unavailable           starting, draining or lost its worker      503  retry
 |   `- WorkerLost        its worker died or makes no progress     503  retry
 |- DeadlineExceeded      no answer within the request's time        504
 |- Superseded            another scheduler has taken over           500
 |- InvalidOutput         the model gave numbers that are not finite 422
 |- ExpertReadError       an expert could not be read from disk      500
 `- ConfigError           operator must act, at start                -
     `- CheckpointError   names the file and the tensor              -
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self


class MoesaicError(Exception):
    """Root of everything this project raises on purpose."""

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code

    def __reduce__(self) -> tuple[object, ...]:
        # Exceptions cross process boundaries; keyword-only state needs an explicit rebuild.
        return (_rebuild, (type(self), self.message, self.__dict__))


class InvalidRequest(MoesaicError):
    """A field of the request is malformed or out of range; `param` names it."""


class ContextTooLong(InvalidRequest):
    """The prompt, or the prompt plus the tokens asked for, does not fit the context."""


class BodyTooLarge(InvalidRequest):
    """The request body is larger than the server accepts."""


class UnsupportedEncoding(InvalidRequest):
    """The request body is encoded in a way that the server cannot read."""


class AuthenticationFailed(MoesaicError):
    """The API key is missing or wrong."""


class PermissionDenied(MoesaicError):
    """Who asks is known, or comes from another site, and may not do this."""


class ModelNotFound(MoesaicError):
    """The request names a model that this server does not serve."""


class NothingToChange(MoesaicError):
    """The server runs in a way in which what is to be changed does not exist; to try again is useless."""


class Overloaded(MoesaicError):
    """The queue is full now; come back after `retry_after_s`."""

    retry_after_s: float = 1.0


class Unavailable(MoesaicError):
    """Starting, draining, or the worker was lost; come back after `retry_after_s`."""

    retry_after_s: float = 2.0


class WorkerLost(Unavailable):
    """The attention worker that had taken the sequence died, was cut off, or makes no progress."""


class DeadlineExceeded(MoesaicError):
    """The request's time ran out; its work was stopped."""


class Superseded(MoesaicError):
    """What this process wanted to write is another's to decide now."""


class InvalidOutput(MoesaicError):
    """The model's numbers for this request are not finite (NaN or infinite); the message names where they began.

    The same prompt gives the same again, so nobody tries it again; other requests are not concerned.
    expert: (layer, expert) whose weights gave them, where that is known.
    """

    expert: tuple[int, int] | None = None

    def __init__(self, message: str, *, param: str | None = None, code: str | None = "invalid_output") -> None:
        super().__init__(message, param=param, code=code)


class ExpertReadError(MoesaicError):
    """Expert weights could not be read while serving; the message names the file.

    expert: (layer, expert), where it is known; only requests that need it fail.
    """

    expert: tuple[int, int] | None = None


class ConfigError(MoesaicError):
    """The configuration cannot work; the message names the field and the way out. `problems`: each, where several."""

    _problems: tuple[str, ...] = ()

    @classmethod
    def of(cls, problems: Sequence[str]) -> Self:
        """One error for all of `problems`, at least one."""
        error = cls("; ".join(problems))
        error._problems = tuple(problems)
        return error

    @property
    def problems(self) -> tuple[str, ...]:
        """What is wrong, one thing each."""
        return self._problems or (self.message,)


class CheckpointError(ConfigError):
    """The checkpoint is damaged or unsupported; the message names the file and the tensor."""


@dataclass(frozen=True, slots=True)
class ErrorCodes:
    """How one class of error looks from outside. `type` is OpenAI's error type."""

    http: int
    grpc: str
    type: str
    retryable: bool


_TABLE: dict[type[MoesaicError], ErrorCodes] = {
    BodyTooLarge: ErrorCodes(413, "INVALID_ARGUMENT", "invalid_request_error", False),
    UnsupportedEncoding: ErrorCodes(415, "INVALID_ARGUMENT", "invalid_request_error", False),
    InvalidRequest: ErrorCodes(400, "INVALID_ARGUMENT", "invalid_request_error", False),
    AuthenticationFailed: ErrorCodes(401, "UNAUTHENTICATED", "authentication_error", False),
    PermissionDenied: ErrorCodes(403, "PERMISSION_DENIED", "permission_error", False),
    ModelNotFound: ErrorCodes(404, "NOT_FOUND", "invalid_request_error", False),
    NothingToChange: ErrorCodes(409, "FAILED_PRECONDITION", "invalid_request_error", False),
    Overloaded: ErrorCodes(429, "RESOURCE_EXHAUSTED", "rate_limit_error", True),
    Unavailable: ErrorCodes(503, "UNAVAILABLE", "service_unavailable_error", True),
    DeadlineExceeded: ErrorCodes(504, "DEADLINE_EXCEEDED", "timeout_error", False),
    InvalidOutput: ErrorCodes(422, "FAILED_PRECONDITION", "invalid_output_error", False),
    ExpertReadError: ErrorCodes(500, "INTERNAL", "server_error", False),
    ConfigError: ErrorCodes(500, "FAILED_PRECONDITION", "server_error", False),
    MoesaicError: ErrorCodes(500, "INTERNAL", "server_error", False),
}


def codes_of(error: BaseException) -> ErrorCodes:
    """Codes of the nearest class in the table; anything foreign is an internal error."""
    for cls in type(error).__mro__:
        if cls in _TABLE:
            return _TABLE[cls]
    return _TABLE[MoesaicError]


def _rebuild(cls: type[MoesaicError], message: str, state: dict[str, object]) -> MoesaicError:
    error = cls(message)
    error.__dict__.update(state)
    return error
