"""Request bodies over HTTP: collects what arrives in time, and has it read beside the event loop.

Knows Starlette and headers; `request_body` knows what is in a body.
"""

from __future__ import annotations

import asyncio
from functools import partial
from typing import TypeVar

from starlette.requests import Request

from cluster.errors import DeadlineExceeded, UnsupportedEncoding
from cluster.frontend.generation.input_pool import InputPool
from cluster.frontend.http.request_body import ENCODINGS, decoded, parse_body
from cluster.frontend.openai_api.request_fields import StrictModel, unknown_fields

_ARRIVAL_S = 60.0

Body = TypeVar("Body", bound=StrictModel)


class BodyReader:
    """Reads the bodies of all routes of one application."""

    def __init__(self, pool: InputPool, *, max_bytes: int, refuses_unknown: bool) -> None:
        """`max_bytes` bounds a body that was compressed; as it arrives, the middleware bounds it."""
        self._pool = pool
        self._max_bytes = max_bytes
        self._refuses_unknown = refuses_unknown

    async def read(self, request: Request, schema: type[Body]) -> Body:
        """The fields of a body; the names of those that are ignored go into the answer's header.

        Raises:
            InvalidRequest: as `parse_body`. BodyTooLarge: as `decoded`. UnsupportedEncoding: names it.
            Overloaded: too many are being read. DeadlineExceeded: it does not arrive.
        """
        media = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media and media != "application/json" and not media.endswith("+json"):
            raise UnsupportedEncoding(f"Content-Type {media[:64]!r} is not supported; send application/json")
        given = ",".join(request.headers.getlist("content-encoding")).lower()
        encodings = [
            name for part in given.split(",") if (name := part.strip().removeprefix("x-")) not in ("", "identity")
        ]
        for name in encodings:
            if name not in ENCODINGS:
                known = ", ".join(ENCODINGS)
                raise UnsupportedEncoding(
                    f"Content-Encoding {name[:64]!r} is not supported; use one of {known} or none"
                )
        raw = await _collected(request)
        # A compressed body may hold a thousand times its size.
        num_bytes = None if encodings else len(raw)
        body, ignored = await self._pool.run(partial(self._parsed, raw, encodings, schema), num_bytes=num_bytes)
        request.state.ignored_fields = ignored
        return body

    def _parsed(self, raw: bytes, encodings: list[str], schema: type[Body]) -> tuple[Body, tuple[str, ...]]:
        plain = decoded(raw, encodings, max_bytes=self._max_bytes)
        body = parse_body(schema, plain, refuses_unknown=self._refuses_unknown)
        return body, unknown_fields(body)


async def read_body(request: Request, schema: type[Body]) -> Body:
    """`BodyReader.read` with the reader of the request's application."""
    reader: BodyReader = request.app.state.bodies
    return await reader.read(request, schema)


async def _collected(request: Request) -> bytes:
    """The bytes of a body; Starlette's own way would hold them until the answer ends."""
    parts: list[bytes] = []
    try:
        async with asyncio.timeout(_ARRIVAL_S):
            async for part in request.stream():
                parts.append(part)
    except TimeoutError as error:
        raise DeadlineExceeded(f"the request body did not arrive within {_ARRIVAL_S:.0f} s") from error
    return b"".join(parts)
