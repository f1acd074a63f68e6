"""Answers of the OpenAI API: JSON bodies and the data of server-sent events.

Knows the shapes of the two endpoints; knows no HTTP. A stream's constant parts are encoded once, so that a token
costs one small JSON string.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Protocol

import orjson

from cluster.errors import MoesaicError, codes_of
from cluster.frontend.sequence import LogprobEntry, TextChunk, TokenText, Usage
from cluster.types import FinishReason

DONE_EVENT = b"data: [DONE]\n\n"
KEEP_ALIVE_EVENT = b": keep-alive\n\n"


class AnswerFormat(Protocol):
    """One endpoint's shape of streamed events and of the whole answer."""

    def opening_event(self, index: int) -> bytes:
        """What a choice begins with; may be empty."""
        ...

    def event(self, index: int, chunk: TextChunk) -> bytes:
        """Events of one chunk of choice `index`; empty if the chunk shows nothing."""
        ...

    def usage_event(self, usage: Usage) -> bytes:
        """The event that ends a stream whose client asked for usage."""
        ...

    def body(self, choices: Sequence[Sequence[TextChunk]], usage: Usage) -> bytes:
        """The answer of a request that did not stream."""
        ...


class ChatAnswer:
    """Shape of /v1/chat/completions."""

    def __init__(self, *, answer_id: str, model: str, created_s: int, include_usage: bool) -> None:
        self._envelope = _Envelope(answer_id, "chat.completion.chunk", model, created_s, include_usage=include_usage)
        self._facts = {"id": answer_id, "object": "chat.completion", "created": created_s, "model": model}

    def opening_event(self, index: int) -> bytes:
        delta = b'{"role":"assistant","content":"","refusal":null}'
        return self._envelope.event(b'{"index":%d,"delta":%s,"logprobs":null,"finish_reason":null}' % (index, delta))

    def event(self, index: int, chunk: TextChunk) -> bytes:
        events = b""
        if chunk.text or chunk.logprobs:
            logprobs = b"null" if chunk.logprobs is None else orjson.dumps(_chat_logprobs(chunk.logprobs))
            fields = (index, orjson.dumps(chunk.text), logprobs)
            choice = b'{"index":%d,"delta":{"content":%s},"logprobs":%s,"finish_reason":null}' % fields
            events = self._envelope.event(choice)
        if chunk.finish_reason is not None:
            fields = (index, chunk.finish_reason.encode())
            events += self._envelope.event(b'{"index":%d,"delta":{},"logprobs":null,"finish_reason":"%s"}' % fields)
        return events

    def usage_event(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def body(self, choices: Sequence[Sequence[TextChunk]], usage: Usage) -> bytes:
        answers: list[dict[str, object]] = []
        for index, chunks in enumerate(choices):
            nothing: list[object] = []
            message = {"role": "assistant", "content": _text(chunks), "refusal": None, "annotations": nothing}
            entries = _entries(chunks)
            logprobs = None if entries is None else _chat_logprobs(entries)
            reason = _reason(chunks)
            answers.append({"index": index, "message": message, "logprobs": logprobs, "finish_reason": reason})
        return orjson.dumps({**self._facts, "choices": answers, "usage": _usage_json(usage)})


class CompletionAnswer:
    """Shape of /v1/completions. `echoes` is the text that each choice starts with, empty without `echo`."""

    def __init__(
        self, *, answer_id: str, model: str, created_s: int, include_usage: bool, echoes: Sequence[str]
    ) -> None:
        self._envelope = _Envelope(answer_id, "text_completion", model, created_s, include_usage=include_usage)
        self._facts = {"id": answer_id, "object": "text_completion", "created": created_s, "model": model}
        self._echoes = echoes
        self._offsets = [0 for _ in echoes]

    def opening_event(self, index: int) -> bytes:
        echo = self._echoes[index]
        return self._event(index, orjson.dumps(echo), b"null", b"null") if echo else b""

    def event(self, index: int, chunk: TextChunk) -> bytes:
        if not chunk.text and not chunk.logprobs and chunk.finish_reason is None:
            return b""
        logprobs = b"null"
        if chunk.logprobs is not None:
            logprobs = orjson.dumps(_completion_logprobs(chunk.logprobs, self._offsets[index]))
            self._offsets[index] += sum(len(entry.chosen.text) for entry in chunk.logprobs)
        reason = b"null" if chunk.finish_reason is None else b'"%s"' % chunk.finish_reason.encode()
        return self._event(index, orjson.dumps(chunk.text), logprobs, reason)

    def usage_event(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def body(self, choices: Sequence[Sequence[TextChunk]], usage: Usage) -> bytes:
        answers = [
            {
                "index": index,
                "text": self._echoes[index] + _text(chunks),
                "logprobs": None if (entries := _entries(chunks)) is None else _completion_logprobs(entries, 0),
                "finish_reason": _reason(chunks),
            }
            for index, chunks in enumerate(choices)
        ]
        return orjson.dumps({**self._facts, "choices": answers, "usage": _usage_json(usage)})

    def _event(self, index: int, text: bytes, logprobs: bytes, reason: bytes) -> bytes:
        fields = (index, text, logprobs, reason)
        return self._envelope.event(b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s}' % fields)


class _Envelope:
    """The constant text around the choice of every event of one stream."""

    def __init__(self, answer_id: str, kind: str, model: str, created_s: int, *, include_usage: bool) -> None:
        facts = {"id": answer_id, "object": kind, "created": created_s, "model": model}
        self._head = b"data: " + orjson.dumps(facts)[:-1] + b',"choices":['
        self._tail = b'],"usage":null}\n\n' if include_usage else b"]}\n\n"

    def event(self, choice: bytes) -> bytes:
        return self._head + choice + self._tail

    def usage_event(self, usage: Usage) -> bytes:
        return self._head + b'],"usage":' + orjson.dumps(_usage_json(usage)) + b"}\n\n"


def error_json(error: BaseException) -> dict[str, object]:
    """OpenAI's error envelope. What is not ours is not explained to clients."""
    is_ours = isinstance(error, MoesaicError)
    fields: dict[str, object] = {
        "message": error.message if is_ours else "internal error; the server's log has the details",
        "type": codes_of(error).type,
        "param": error.param if is_ours else None,
        "code": error.code if is_ours else None,
    }
    return {"error": fields}


def error_event(error: BaseException) -> bytes:
    """An error within a stream, after the status line is gone."""
    return b"data: " + orjson.dumps(error_json(error)) + b"\n\n"


def total_usage(choices: Sequence[Usage]) -> Usage:
    """Sum over the sequences of one request."""
    return Usage(
        prompt_tokens=sum(usage.prompt_tokens for usage in choices),
        completion_tokens=sum(usage.completion_tokens for usage in choices),
        cached_tokens=sum(usage.cached_tokens for usage in choices),
    )


def _usage_json(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _text(chunks: Sequence[TextChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def _reason(chunks: Sequence[TextChunk]) -> FinishReason | None:
    return chunks[-1].finish_reason if chunks else None


def _entries(chunks: Sequence[TextChunk]) -> list[LogprobEntry] | None:
    if all(chunk.logprobs is None for chunk in chunks):
        return None
    return [entry for chunk in chunks for entry in chunk.logprobs or ()]


def _chat_logprobs(entries: Sequence[LogprobEntry]) -> dict[str, object]:
    content = [{**_chat_token(entry.chosen), "top_logprobs": list(map(_chat_token, entry.top))} for entry in entries]
    return {"content": content, "refusal": None}


def _chat_token(token: TokenText) -> dict[str, object]:
    return {"token": token.text, "bytes": list(token.raw), "logprob": token.logprob}


def _completion_logprobs(entries: Sequence[LogprobEntry], offset: int) -> Mapping[str, object]:
    offsets: list[int] = []
    for entry in entries:
        offsets.append(offset)
        offset += len(entry.chosen.text)
    return {
        "tokens": [_token_key(entry.chosen) for entry in entries],
        "token_logprobs": [entry.chosen.logprob for entry in entries],
        "top_logprobs": [
            {_token_key(token): token.logprob for token in (entry.chosen, *entry.top)} for entry in entries
        ],
        "text_offset": offsets,
    }


def _token_key(token: TokenText) -> str:
    """A part of a character is written as OpenAI does, so that two of them stay two keys."""
    if "\N{REPLACEMENT CHARACTER}" not in token.text:
        return token.text
    return "bytes:" + "".join(f"\\x{byte:02x}" for byte in token.raw)
