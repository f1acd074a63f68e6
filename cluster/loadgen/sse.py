"""Server-sent events as OpenAI-compatible servers send them. Knows lines and JSON; opens no connection."""

from __future__ import annotations

import json
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from typing import Any, cast

from cluster.errors import Unavailable


async def read_events(lines: AsyncIterator[str]) -> AsyncGenerator[dict[str, Any]]:
    """JSON objects of a stream up to `[DONE]`; comments (keep-alives) are passed over.

    Raises:
        Unavailable: the stream ended before `[DONE]`, or an event is not a JSON object.
    """
    data: list[str] = []
    async for line in lines:
        if line.startswith("data:"):
            data.append(line[5:].removeprefix(" "))
        elif not line and data:
            text = "\n".join(data)
            data.clear()
            if text == "[DONE]":
                return
            yield _parsed(text)
    if data == ["[DONE]"]:  # a server that leaves out the last empty line
        return
    raise Unavailable("the stream broke off before its end", code="stream_broken")


def _parsed(text: str) -> dict[str, Any]:
    try:
        event = json.loads(text)
    except ValueError as error:
        raise Unavailable(f"the stream has an event that is not JSON: {text[:80]!r}", code="bad_event") from error
    if not isinstance(event, dict):
        raise Unavailable(f"the stream has an event that is not an object: {text[:80]!r}", code="bad_event")
    return cast("dict[str, Any]", event)


def event_error(event: Mapping[str, Any]) -> str | None:
    """The error that an event reports, as its code, type or text; None for other events."""
    error: object = event.get("error")
    if isinstance(error, dict):
        fields = cast("dict[str, Any]", error)
        return str(fields.get("code") or fields.get("type") or fields.get("message") or "error")
    return None if error is None else str(error)


def event_error_message(event: Mapping[str, Any]) -> str | None:
    """The text of the error that an event reports, else its code; None for other events."""
    error: object = event.get("error")
    if isinstance(error, dict):
        return str(cast("dict[str, Any]", error).get("message") or event_error(event))
    return event_error(event)


def event_text(event: Mapping[str, Any]) -> str:
    """New text in an event of a completion or chat completion; empty if it brings none."""
    choice = _choice(event)
    delta = cast("dict[str, Any]", choice.get("delta") or {})
    return str(choice.get("text") or delta.get("content") or "")


def event_finish_reason(event: Mapping[str, Any]) -> str | None:
    """Why the sequence ended, in its last event."""
    return cast("str | None", _choice(event).get("finish_reason"))


def _choice(event: Mapping[str, Any]) -> dict[str, Any]:
    choices = cast("list[dict[str, Any]]", event.get("choices") or [])
    return choices[0] if choices else {}
