"""Answers of the OpenAI API: JSON bodies and the data of server-sent events.

Knows the shapes of the two endpoints; knows no HTTP. A stream's constant parts are encoded once, so that a token
costs one small JSON string.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import orjson

from cluster.errors import MoesaicError, codes_of
from cluster.frontend.generation.sequence import TextChunk, Usage
from cluster.frontend.openai_api.answer_facts import AnswerFacts
from cluster.frontend.openai_api.logprobs import (
    Echo,
    LogprobFormat,
    entries_of,
    prompt_entries_of,
    prompt_logprobs_json,
)
from cluster.types import FinishReason

DONE_EVENT = b"data: [DONE]\n\n"
_NO_TOKEN_IDS = b',"token_ids":[]'
KEEP_ALIVE_EVENT = b": keep-alive\n\n"


class AnswerFormat(Protocol):
    """One endpoint's shape of streamed events and of the whole answer."""

    @property
    def facts(self) -> AnswerFacts:
        """Of the answer that is written."""
        ...

    def opening_event(self, index: int, chunk: TextChunk) -> bytes:
        """What a choice begins with, `chunk` being its first; may be empty."""
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
    """Shape of /v1/chat/completions. `echo` is what every answer begins with."""

    def __init__(self, facts: AnswerFacts, *, echo: str = "") -> None:
        self.facts = facts
        self._echo = echo
        self._envelope = _Envelope(facts, "chat.completion.chunk")
        self._usage = _RunningUsage(facts)
        self._logprobs = LogprobFormat(names_ids=facts.names_token_ids)

    def opening_event(self, index: int, chunk: TextChunk) -> bytes:
        delta = b'{"role":"assistant","content":%s,"refusal":null}' % orjson.dumps(self._echo)
        extra = ids = b""
        if self.facts.gives_token_ids:
            extra = b',"prompt_token_ids":' + orjson.dumps(list(self.facts.prompt_of(index)))
            ids = _NO_TOKEN_IDS
        choice = b'{"index":%d,"delta":%s,"logprobs":null,"finish_reason":null%s}' % (index, delta, ids)
        return self._envelope.event(choice, extra, self._usage.of(index))

    def event(self, index: int, chunk: TextChunk) -> bytes:
        usage = self._usage.take(index, chunk)
        ids = _token_ids_field(chunk) if self.facts.gives_token_ids else b""
        shows = bool(chunk.text or chunk.logprobs or (ids and chunk.token_ids))
        if not shows and chunk.finish_reason is None:
            return b""
        delta = b'{"content":%s}' % orjson.dumps(chunk.text) if shows else b"{}"
        logprobs = b"null" if chunk.logprobs is None else orjson.dumps(self._logprobs.chat(chunk.logprobs))
        reason = b"null"
        if chunk.finish_reason is not None:
            reason = b'"%s","stop_reason":%s' % (chunk.finish_reason.encode(), orjson.dumps(chunk.stop_reason))
        fields = (index, delta, logprobs, reason, ids)
        choice = b'{"index":%d,"delta":%s,"logprobs":%s,"finish_reason":%s%s}' % fields
        return self._envelope.event(choice, usage=usage)

    def usage_event(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def body(self, choices: Sequence[Sequence[TextChunk]], usage: Usage) -> bytes:
        answers: list[dict[str, object]] = []
        for index, chunks in enumerate(choices):
            nothing: list[object] = []
            text = self._echo + _text(chunks)
            message = {"role": "assistant", "content": text, "refusal": None, "annotations": nothing}
            entries = entries_of(chunks)
            logprobs = None if entries is None else self._logprobs.chat(entries)
            choice: dict[str, object] = {"index": index, "message": message, "logprobs": logprobs, **_end(chunks)}
            choice["token_ids"] = _token_ids(chunks) if self.facts.gives_token_ids else None
            answers.append(choice)
        body = {**self.facts.head("chat.completion"), "choices": answers, "usage": _usage_json(usage)}
        body |= self.facts.metrics(usage)
        scored = prompt_entries_of(choices[0])
        body["prompt_logprobs"] = None if scored is None else prompt_logprobs_json(scored)
        body["prompt_token_ids"] = list(self.facts.prompt_of(0)) if self.facts.gives_token_ids else None
        return orjson.dumps(body)


class CompletionAnswer:
    """Shape of /v1/completions. `echoes` are what the choices of each prompt begin with, empty without `echo`."""

    def __init__(self, facts: AnswerFacts, *, echoes: Sequence[Echo] = (), gives_prompt_logprobs: bool = False) -> None:
        self.facts = facts
        self._envelope = _Envelope(facts, "text_completion")
        self._usage = _RunningUsage(facts)
        self._logprobs = LogprobFormat(names_ids=facts.names_token_ids)
        self._echoes = echoes
        self._gives_prompt_logprobs = gives_prompt_logprobs

    def opening_event(self, index: int, chunk: TextChunk) -> bytes:
        echo = self._echo(index)
        extra = b""
        if self.facts.gives_token_ids:
            extra = _NO_TOKEN_IDS + b',"prompt_token_ids":' + orjson.dumps(list(self.facts.prompt_of(index)))
        if echo is None:
            return self._event(index, b'""', b"null", b"null", extra) if extra else b""
        logprobs = b"null"
        if chunk.logprobs is not None and chunk.prompt_logprobs is not None:
            logprobs = orjson.dumps(self._logprobs.completion((), echo=echo, prompt=chunk.prompt_logprobs))
        return self._event(index, orjson.dumps(echo.text), logprobs, b"null", extra)

    def event(self, index: int, chunk: TextChunk) -> bytes:
        self._usage.take(index, chunk)
        ids = _token_ids_field(chunk) if self.facts.gives_token_ids else b""
        shows = chunk.text or chunk.logprobs or chunk.finish_reason is not None or (ids and chunk.token_ids)
        if not shows:
            return b""
        logprobs = b"null"
        if chunk.logprobs is not None:
            logprobs = orjson.dumps(self._logprobs.completion(chunk.logprobs, echo=self._echo(index)))
        reason = b"null"
        if chunk.finish_reason is not None:
            reason = b'"%s","stop_reason":%s' % (chunk.finish_reason.encode(), orjson.dumps(chunk.stop_reason))
        return self._event(index, orjson.dumps(chunk.text), logprobs, reason, ids)

    def usage_event(self, usage: Usage) -> bytes:
        return self._envelope.usage_event(usage)

    def body(self, choices: Sequence[Sequence[TextChunk]], usage: Usage) -> bytes:
        answers = [self._choice(index, chunks) for index, chunks in enumerate(choices)]
        body = {**self.facts.head("text_completion"), "choices": answers, "usage": _usage_json(usage)}
        body |= self.facts.metrics(usage)
        return orjson.dumps(body)

    def _choice(self, index: int, chunks: Sequence[TextChunk]) -> dict[str, object]:
        echo, entries, scored = self._echo(index), entries_of(chunks), prompt_entries_of(chunks)
        logprobs = None if entries is None else self._logprobs.completion(entries, echo=echo, prompt=scored)
        text = _text(chunks) if echo is None else echo.text + _text(chunks)
        choice: dict[str, object] = {"index": index, "text": text, "logprobs": logprobs, **_end(chunks)}
        told = scored if self._gives_prompt_logprobs else None
        choice["prompt_logprobs"] = None if told is None else prompt_logprobs_json(told)
        choice["token_ids"] = _token_ids(chunks) if self.facts.gives_token_ids else None
        choice["prompt_token_ids"] = list(self.facts.prompt_of(index)) if self.facts.gives_token_ids else None
        return choice

    def _echo(self, index: int) -> Echo | None:
        return self._echoes[index // self.facts.n] if self._echoes else None

    def _event(self, index: int, text: bytes, logprobs: bytes, reason: bytes, extra: bytes) -> bytes:
        fields = (index, text, logprobs, reason, extra)
        choice = b'{"index":%d,"text":%s,"logprobs":%s,"finish_reason":%s%s}' % fields
        return self._envelope.event(choice, usage=self._usage.of(index))


class _RunningUsage:
    """Tokens of each choice so far, for streams that tell them in every event; as in vLLM, of that choice alone."""

    def __init__(self, facts: AnswerFacts) -> None:
        self._facts = facts
        self._num_tokens: dict[int, int] = {}

    def take(self, index: int, chunk: TextChunk) -> bytes | None:
        """Count a chunk of choice `index`; then as `of`."""
        self._num_tokens[index] = self._num_tokens.get(index, 0) + len(chunk.token_ids)
        return self.of(index)

    def of(self, index: int) -> bytes | None:
        """The usage of choice `index` so far as JSON; None if the client did not ask for it."""
        if not self._facts.continuous_usage:
            return None
        num_prompt, num_tokens = len(self._facts.prompt_of(index)), self._num_tokens.get(index, 0)
        fields = (num_prompt, num_tokens, num_prompt + num_tokens)
        return b'{"prompt_tokens":%d,"completion_tokens":%d,"total_tokens":%d}' % fields


class _Envelope:
    """The constant text around the choice of every event of one stream."""

    def __init__(self, facts: AnswerFacts, kind: str) -> None:
        self._facts = facts
        self._head = b"data: " + orjson.dumps(facts.head(kind))[:-1] + b',"choices":['
        self._tail = b',"usage":null}\n\n' if facts.include_usage else b"}\n\n"

    def event(self, choice: bytes, extra: bytes = b"", usage: bytes | None = None) -> bytes:
        """An event with one choice and, behind it, `extra` fields and the usage so far."""
        tail = self._tail if usage is None else b',"usage":' + usage + b"}\n\n"
        return self._head + choice + b"]" + extra + tail

    def usage_event(self, usage: Usage) -> bytes:
        last = {"usage": _usage_json(usage), **self._facts.metrics(usage)}
        return self._head + b"]," + orjson.dumps(last)[1:] + b"\n\n"


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


def _usage_json(usage: Usage) -> dict[str, object]:
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {"cached_tokens": usage.cached_tokens},
    }


def _text(chunks: Sequence[TextChunk]) -> str:
    return "".join(chunk.text for chunk in chunks)


def _end(chunks: Sequence[TextChunk]) -> dict[str, FinishReason | str | int | None]:
    last = chunks[-1] if chunks else None
    return {
        "finish_reason": None if last is None else last.finish_reason,
        "stop_reason": None if last is None else last.stop_reason,
    }


def _token_ids(chunks: Sequence[TextChunk]) -> list[int]:
    return [token_id for chunk in chunks for token_id in chunk.token_ids]


def _token_ids_field(chunk: TextChunk) -> bytes:
    return b',"token_ids":' + orjson.dumps(list(chunk.token_ids))
