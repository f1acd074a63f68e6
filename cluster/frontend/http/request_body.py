"""A request body from bytes to fields: encoding, JSON, schema. Pure: knows no HTTP. A refusal says what is wrong."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar, cast

import orjson
from pydantic import ValidationError

from cluster.errors import BodyTooLarge, InvalidRequest
from cluster.frontend.openai_api.request_fields import StrictModel, refuse_unknown
from cluster.frontend.openai_api.unsupported import MAX_ECHO_CHARS, echo

ENCODINGS = ("gzip", "deflate")
MAX_DEPTH = 100

_MAX_ERRORS = 10
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_GZIP, _ZLIB, _RAW = 16 + zlib.MAX_WBITS, zlib.MAX_WBITS, -zlib.MAX_WBITS

Body = TypeVar("Body", bound=StrictModel)


def parse_body(schema: type[Body], body: bytes, *, refuses_unknown: bool = False) -> Body:
    """Read a request body.

    Args: refuses_unknown: also of schemas that keep unknown fields aside.
    Raises:
        InvalidRequest: not UTF-8, not JSON, or not as `schema` wants it; the message is bounded in size.
    """
    body = body.removeprefix(_BYTE_ORDER_MARK)
    try:
        body.decode()
        fields: object = orjson.loads(body)
        if not isinstance(fields, dict):
            raise InvalidRequest("the request body must be a JSON object")
        if _is_deeper(cast("dict[str, object]", fields), MAX_DEPTH):
            raise InvalidRequest(f"the request body is nested more than {MAX_DEPTH} levels deep")
        parsed = schema.model_validate(fields)
        if refuses_unknown:
            refuse_unknown(parsed)
        return parsed
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the request body is not valid UTF-8 (byte {error.start})") from None
    except orjson.JSONDecodeError as error:
        raise InvalidRequest(f"the request body is not valid JSON: {error}"[:MAX_ECHO_CHARS]) from None
    except ValidationError as error:
        details = error.errors(include_url=False, include_context=False)
        message = "; ".join(_explain(detail) for detail in details[:_MAX_ERRORS])
        if len(details) > _MAX_ERRORS:
            message += f"; and {len(details) - _MAX_ERRORS} more"
        raise InvalidRequest(message, param=_path(details[0]["loc"]) or None) from None


def decoded(body: bytes, encodings: Sequence[str], *, max_bytes: int) -> bytes:
    """The body without its `Content-Encoding`s, which were applied in this order.

    Raises:
        InvalidRequest: an encoding is damaged. BodyTooLarge: it holds more than `max_bytes`; nothing larger is held.
    """
    for encoding in reversed(encodings):
        body = _inflated(body, encoding, max_bytes)
    return body


def _inflated(body: bytes, encoding: str, max_bytes: int) -> bytes:
    is_gzip = encoding == "gzip"
    # "deflate" is zlib's format, but some clients send it bare.
    has_head = len(body) >= 2 and body[0] & 0x0F == 8 and int.from_bytes(body[:2]) % 31 == 0
    parts: list[bytes] = []
    left = max_bytes
    while body:
        stream = zlib.decompressobj(_GZIP if is_gzip else _ZLIB if has_head else _RAW)
        try:
            part = stream.decompress(body, left + 1)
        except zlib.error as error:
            raise InvalidRequest(f"the request body is not valid {encoding}: {error}") from None
        left -= len(part)
        if left < 0:
            raise BodyTooLarge(f"the request body exceeds the limit of {max_bytes} bytes when it is decompressed")
        if not stream.eof:
            raise InvalidRequest(f"the request body is not valid {encoding}: it ends too early")
        parts.append(part)
        body = stream.unused_data if is_gzip else b""  # a gzip body may have several members
    return b"".join(parts)


def _is_deeper(fields: dict[str, object], depth: int) -> bool:
    """Whether containers are nested more than `depth` levels; without recursion."""
    level: list[dict[str, object] | list[object]] = [fields]
    for _ in range(depth):
        level = [
            cast("dict[str, object] | list[object]", inner)
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True


def _explain(detail: Mapping[str, Any]) -> str:
    path = _path(detail["loc"])
    match detail["type"]:
        case "extra_forbidden":
            return f"Unrecognized request argument supplied: {path}"
        case "missing":
            return f"Missing required parameter: '{path}'"
        case _:
            reason = str(detail["msg"]).removeprefix("Value error, ")
            return f"{path}: {reason} (got {echo(detail['input'])})"


def _path(location: Sequence[int | str]) -> str:
    return ".".join(str(part) for part in location)[:MAX_ECHO_CHARS]
