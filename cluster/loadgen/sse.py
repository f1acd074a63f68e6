"""Server-sent events as OpenAI-compatible servers send them. Knows bytes, lines and JSON; opens no connection.

Every stream that this project reads goes through here. Lines end as the HTML standard says, at CR, LF or CRLF and
nowhere else: U+2028 or U+0085 within a JSON string are text, though `str.splitlines` and httpx's line reader cut there.
"""

from __future__ import annotations

import codecs
import json
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping
from typing import Any, cast

from cluster.errors import Unavailable


async def read_events(chunks: AsyncIterator[bytes]) -> AsyncGenerator[dict[str, Any]]:
    """JSON objects of a stream up to `[DONE]`; comments (keep-alives) and other fields are passed over.

    Args:
        chunks: the body as it comes, cut anywhere, as httpx's `aiter_bytes` gives it.
    Raises:
        Unavailable: the stream ended before `[DONE]`, or an event is not a JSON object.
    """
    lines = _Lines()
    data: list[str] = []
    async for chunk in chunks:
        for line in lines.push(chunk):
            if line:
                data += _data_of(line)
            elif data:
                text = "\n".join(data)
                data.clear()
                if text == "[DONE]":
                    return
                yield _parsed(text)
    if [*data, *_data_of(lines.rest())] == ["[DONE]"]:  # a server that leaves out the last empty line
        return
    raise Unavailable("the stream broke off before its end", code="stream_broken")


class _Lines:
    """Cuts a stream of UTF-8 into lines. A BOM at the start is no text; a CR and its LF may come in two chunks."""

    def __init__(self) -> None:
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors="replace")
        self._begun: list[str] = []
        self._skips_lf = False

    def push(self, chunk: bytes) -> Iterator[str]:
        """The lines that end in this chunk."""
        text = self._decoder.decode(chunk)
        if self._skips_lf and text:
            text = text.removeprefix("\n")
            self._skips_lf = False
        if text.endswith("\r"):
            self._skips_lf = True
        *ended, begun = text.replace("\r\n", "\n").replace("\r", "\n").split("\n")
        for line in ended:
            yield "".join(self._begun) + line
            self._begun.clear()
        if begun:
            self._begun.append(begun)

    def rest(self) -> str:
        """The line that has not ended."""
        return "".join(self._begun)


def _data_of(line: str) -> list[str]:
    """What a line adds to its event's data: nothing unless it is a `data` field."""
    name, _, value = line.partition(":")
    return [value.removeprefix(" ")] if name == "data" else []


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
