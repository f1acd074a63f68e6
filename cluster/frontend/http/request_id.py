"""Names of requests: the client's own where it may go into logs and headers, else a new one."""

from __future__ import annotations

import uuid

MAX_ID_CHARS = 128


def choose_request_id(given: str | None) -> str:
    """`given` if it is short and plain ASCII without spaces, else a new id."""
    if given and len(given) <= MAX_ID_CHARS and given.isascii() and given.isprintable() and " " not in given:
        return given
    return uuid.uuid4().hex
