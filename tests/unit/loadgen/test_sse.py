"""Reading server-sent events: lines end where the standard ends them, however the body is cut into chunks."""

from __future__ import annotations

import asyncio
import itertools
import json
from collections.abc import AsyncIterator, Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cluster.errors import Unavailable
from cluster.loadgen.sse import read_events

# Where `str.splitlines` cuts and a stream must not.
NO_LINE_ENDS = "\v\f\x1c\x1d\x1e\x85\u2028\u2029"


def events_of(chunks: Sequence[bytes]) -> list[dict[str, object]]:
    async def body() -> AsyncIterator[bytes]:
        for chunk in chunks:
            yield chunk

    async def collect() -> list[dict[str, object]]:
        return [event async for event in read_events(body())]

    return asyncio.run(collect())


def cut(body: bytes, places: Sequence[int]) -> list[bytes]:
    bounds = [0, *sorted(place % (len(body) + 1) for place in places), len(body)]
    return [body[start:end] for start, end in itertools.pairwise(bounds)]


@given(
    texts=st.lists(st.text(st.characters(exclude_categories=["Cs"]) | st.sampled_from(NO_LINE_ENDS)), max_size=4),
    ends=st.sampled_from([("\n",), ("\r",), ("\r\n",), ("\n", "\r\n"), ("\r\n", "\r")]),
    places=st.lists(st.integers(0, 10_000), max_size=8),
    bom=st.booleans(),
    comment=st.booleans(),
)
def test_every_text_arrives_whatever_ends_lines_and_cuts_chunks(texts, ends, places, bom, comment):
    lines = []
    for text in texts:
        lines += [": keep-alive", "event: chunk"] if comment else []
        lines += [f"data: {json.dumps({'text': text}, ensure_ascii=False)}", ""]
    lines += ["data: [DONE]", ""]
    body = "".join(line + ends[number % len(ends)] for number, line in enumerate(lines))
    sent = ("\ufeff" if bom else "").encode() + body.encode()
    assert events_of(cut(sent, places)) == [{"text": text} for text in texts]


def test_data_of_several_lines_is_one_event():
    assert events_of([b'data:{"a":\ndata: 1,\ndata\ndata:  "b": 2}\n\ndata: [DONE]\n\n']) == [{"a": 1, "b": 2}]


def test_a_byte_order_mark_is_text_anywhere_but_at_the_start():
    body = '\ufeffdata: {"a": "\ufeff"}\n\ndata: [DONE]\n\n'
    assert events_of([bytes([byte]) for byte in body.encode()]) == [{"a": "\ufeff"}]


@pytest.mark.parametrize("rest", [b"", b"data: [DON", b": [DONE]", b"data: x\ndata: [DONE]"])
def test_a_stream_without_its_end_is_broken(rest):
    with pytest.raises(Unavailable, match="broke off"):
        events_of([b'data: {"a": 1}\n\n' + rest])


def test_the_last_empty_line_may_be_missing():
    assert events_of([b'data: {"a": 1}\r\n\r', b"\ndata: [DONE]"]) == [{"a": 1}]
    assert events_of([b'data: {"a": 1}\r\rdata: [DONE]\r']) == [{"a": 1}]
