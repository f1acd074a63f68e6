"""Frames of the token stream as bytes: MessagePack, checked field by field. Nothing in them is ever run.

A frame is `[version, [stalled_s, allowed_s, silence_s], [item, ...]]`. An item is a chunk, `[request id, token ids,
finish reason, [cached tokens, seconds queued], logprobs, prompt logprobs]`, or an error, `[request id, class, message,
param, code, retry after, expert]`. A token's log-probabilities are `[id, logprob, rank, ids of the likeliest, their
logprobs]`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, cast

import msgpack  # pyright: ignore[reportMissingTypeStubs]

from cluster import errors
from cluster.errors import ExpertReadError, InvalidOutput, MoesaicError, Overloaded, Unavailable
from cluster.token_stream.progress import Progress
from cluster.types import FinishReason, RequestId, TokenChunk, TokenLogprob

Item = TokenChunk | MoesaicError
Items = Sequence[tuple[RequestId, Item]]

_MSGPACK: Any = msgpack  # it has no types
_VERSION = 1
_MAX_ID = 2**31
_MAX_TEXT = 64 * 1024
_MAX_NAME = 512  # characters of a request's id and of short words
_INT, _FLOAT = frozenset({int}), frozenset({float})
_REASONS = {str(reason): reason for reason in FinishReason}
_CHUNK_FIELDS, _ERROR_FIELDS = 6, 7


class CodecError(ValueError):
    """Bytes that are no frame of ours; says what is wrong with them."""


def encode_frame(progress: Progress, items: Items) -> bytes:
    """One frame."""
    life = (float(progress.stalled_s), float(progress.allowed_s), float(progress.silence_s))
    return cast(bytes, _MSGPACK.packb((_VERSION, life, [_plain(request_id, item) for request_id, item in items])))


def decode_frame(body: bytes) -> tuple[Progress, Items]:
    """Inverse of `encode_frame`.

    Raises:
        CodecError: another version, a field that is missing, of another type or out of range.
    """
    try:
        value: Any = _MSGPACK.unpackb(body, use_list=False, raw=False, strict_map_key=True)
    except (ValueError, msgpack.UnpackException) as error:
        raise CodecError(f"{len(body)} bytes that are no MessagePack: {error!r:.200}") from error
    version, life, items = _fields(value, 3, "frame")
    if type(version) is not int or version != _VERSION:
        raise CodecError(f"frame version {version!r:.40}; this process speaks {_VERSION}: the releases differ")
    stalled_s, allowed_s, silence_s = (_duration(part) for part in _fields(life, 3, "progress"))
    progress = Progress(stalled_s=stalled_s, allowed_s=allowed_s, silence_s=silence_s)
    return progress, [_item(item) for item in _tuple(items, "items")]


def _plain(request_id: RequestId, item: Item) -> tuple[object, ...]:
    if isinstance(item, TokenChunk):
        scores, prompt = item.logprobs, item.prompt_logprobs
        return (
            request_id,
            item.token_ids,
            item.finish_reason,
            (item.num_cached_tokens, float(item.queued_s)),
            None if scores is None else [_plain_logprob(entry) for entry in scores],
            None if prompt is None else [_plain_logprob(entry) for entry in prompt],
        )
    # The nearest class that both sides know: one of a module that the front end does not have is its parent there.
    kind = next(cls.__name__ for cls in type(item).__mro__ if cls.__name__ in _ERRORS)
    retry_after_s = vars(item).get("retry_after_s")  # if not what its class says
    expert = item.expert if isinstance(item, ExpertReadError | InvalidOutput) else None
    return request_id, kind, item.message[:_MAX_TEXT], item.param, item.code, retry_after_s, expert


def _plain_logprob(entry: TokenLogprob) -> tuple[object, ...]:
    ids, logprobs = [i for i, _ in entry.top], [float(logprob) for _, logprob in entry.top]
    return entry.token_id, float(entry.logprob), entry.rank, ids, logprobs


def _item(value: object) -> tuple[RequestId, Item]:
    fields = _tuple(value, "item")
    if len(fields) == _CHUNK_FIELDS:
        return RequestId(_text(fields[0], _MAX_NAME)), _chunk(fields)
    if len(fields) == _ERROR_FIELDS:
        return RequestId(_text(fields[0], _MAX_NAME)), _error(fields)
    raise CodecError(f"an item of {len(fields)} fields")


def _chunk(fields: tuple[Any, ...]) -> TokenChunk:
    _, ids, reason, before, scores, prompt = fields
    num_cached, queued_s = _fields(before, 2, "what came before")
    if reason is not None and (type(reason) is not str or reason not in _REASONS):
        raise CodecError(f"a finish reason {reason!r:.40}")
    return TokenChunk(
        token_ids=_ids(ids),
        logprobs=None if scores is None else tuple([_logprob(entry) for entry in _tuple(scores, "logprobs")]),
        finish_reason=None if reason is None else _REASONS[reason],
        num_cached_tokens=_id(num_cached),
        queued_s=_duration(queued_s),
        prompt_logprobs=None if prompt is None else tuple([_logprob(entry) for entry in _tuple(prompt, "logprobs")]),
    )


def _error(fields: tuple[Any, ...]) -> MoesaicError:
    _, kind, message, param, code, retry_after_s, expert = fields
    cls = _ERRORS.get(_text(kind, _MAX_NAME))
    if cls is None:
        raise CodecError(f"an error of class {kind!r:.80}")
    error = cls(
        _text(message, _MAX_TEXT),
        param=None if param is None else _text(param, _MAX_TEXT),
        code=None if code is None else _text(code, _MAX_TEXT),
    )
    if isinstance(error, Overloaded | Unavailable) and retry_after_s is not None:
        error.retry_after_s = _duration(retry_after_s)
    if isinstance(error, ExpertReadError | InvalidOutput) and expert is not None:
        layer, index = _fields(expert, 2, "expert")
        error.expert = _id(layer), _id(index)
    return error


def _logprob(value: object) -> TokenLogprob:
    token_id, logprob, rank, ids, scores = _fields(value, 5, "logprob")
    if len(_ids(ids)) != len(_tuple(scores, "logprobs")):
        raise CodecError(f"{len(ids)} likeliest tokens with {len(scores)} log-probabilities")
    if not _FLOAT.issuperset(map(type, scores)) or type(logprob) is not float:
        raise CodecError("a log-probability that is no floating-point number")
    return TokenLogprob(_id(token_id), logprob, tuple(zip(ids, scores)), None if rank is None else _id(rank))  # noqa: B905


def _tuple(value: object, what: str) -> tuple[Any, ...]:
    if type(value) is not tuple:
        raise CodecError(f"{what}: {type(value).__name__} where a list belongs")
    return cast("tuple[Any, ...]", value)


def _fields(value: object, number: int, what: str) -> tuple[Any, ...]:
    fields = _tuple(value, what)
    if len(fields) != number:
        raise CodecError(f"{what}: {len(fields)} fields; {number} belong there")
    return fields


def _ids(value: object) -> tuple[int, ...]:
    ids = _tuple(value, "token ids")
    if ids and (not _INT.issuperset(map(type, ids)) or min(ids) < 0 or max(ids) >= _MAX_ID):
        raise CodecError(f"{len(ids)} token ids; one is no number from 0 to {_MAX_ID - 1}")
    return ids


def _id(value: object) -> int:
    if type(value) is not int or not 0 <= value < _MAX_ID:  # nor a bool
        raise CodecError(f"a number {value!r:.40} where one from 0 to {_MAX_ID - 1} belongs")
    return value


def _duration(value: object) -> float:
    if type(value) is not float or not 0 <= value < math.inf:
        raise CodecError(f"{value!r:.40} where a duration in seconds belongs")
    return value


def _text(value: object, max_characters: int) -> str:
    if type(value) is not str or len(value) > max_characters:
        raise CodecError(f"{value!r:.40} where a text of at most {max_characters} characters belongs")
    return value


_ERRORS: dict[str, type[MoesaicError]] = {
    name: cls for name, cls in vars(errors).items() if isinstance(cls, type) and issubclass(cls, MoesaicError)
}
