"""Fields that clients send and this server does not serve: neutral ones pass, others are ignored by name or refused."""

from __future__ import annotations

import asyncio
import json

import pytest
from fakes import FakeAttentionWorker

from cluster.frontend.openai_api.schema import ChatRequest, CompletionRequest, Message, TokenizeRequest
from cluster.frontend.openai_api.unsupported import known_parameters

HEADER = "x-moesaic-ignored-fields"
CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
COMPLETION = {"prompt": "hi", "max_tokens": 3}
BODIES = {"/v1/chat/completions": CHAT, "/v1/completions": COMPLETION, "/tokenize": {"prompt": "hi"}}
SCHEMAS = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
}


@pytest.fixture
def ask(make_app, call):
    """The answer to a body that must be good."""

    def send(path, body, **config):
        response = asyncio.run(call(make_app(FakeAttentionWorker(), **config), "POST", path, json=body))
        assert response.status_code == 200, response.text
        return response

    return send


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("strict", [False, True])
def test_null_is_as_good_as_nothing_in_every_known_field(ask, path, strict):
    schema = SCHEMAS[path]
    optional = {name: None for name, field in schema.model_fields.items() if not field.is_required()}
    body = dict.fromkeys(known_parameters()) | optional | BODIES[path]
    assert HEADER not in ask(path, body, strict=strict).headers


@pytest.mark.parametrize("path", BODIES)
@pytest.mark.parametrize("name", sorted(known_parameters()))
def test_what_asks_for_nothing_passes(ask, path, name):
    if name in SCHEMAS[path].model_fields:
        return
    for value in (*known_parameters()[name], "", [], {}, {"inner": None}):
        assert HEADER not in ask(path, BODIES[path] | {name: value}, strict=True).headers


@pytest.mark.parametrize("stream", [False, True])
def test_unknown_fields_are_ignored_and_named(ask, stream):
    message = {"role": "user", "content": "hi", "colour": "red"}
    body = CHAT | {"messages": [*CHAT["messages"], message], "stream": stream, "tempratur": 1, "nothing": None}
    names = ask("/v1/chat/completions", body).headers[HEADER].split(", ")
    assert sorted(names) == ["messages.1.colour", "nothing", "tempratur"]


def test_names_are_fit_for_a_header(ask):
    wild = {"a b\r\nset-cookie: x": 1, "é" * 500: 1, **{f"field{n}": 1 for n in range(100)}}
    value = ask("/v1/completions", COMPLETION | wild).headers[HEADER]
    assert value.startswith("a?b??set-cookie??x, ????")
    assert len(value) < 16 * 66


def test_null_in_messages_and_stream_options(ask):
    message = dict.fromkeys(Message.model_fields) | {"role": "user", "content": "hi"}
    options = {"include_usage": None, "continuous_usage_stats": None, "include_obfuscation": None}
    ask("/v1/chat/completions", CHAT | {"messages": [message], "stream": True, "stream_options": options})


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
@pytest.mark.parametrize("n", [1, 2])
def test_usage_in_every_chunk(ask, tokenizer, path, n):
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = BODIES[path] | {"n": n, "stream": True, "stream_options": options}
    text = ask(path, body).text
    chunks = [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]
    *pieces, last = chunks
    seen = {index: [] for index in range(n)}
    for piece in pieces:
        usage = piece["usage"]
        assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]
        assert usage["prompt_tokens"] == last["usage"]["prompt_tokens"] > 0
        seen[piece["choices"][0]["index"]].append(usage["completion_tokens"])
    for counts in seen.values():
        assert counts == sorted(counts)
        assert counts[-1] == 3
    assert last["choices"] == []
    assert last["usage"]["completion_tokens"] == 3 * n


def test_continuous_usage_alone_asks_for_nothing_as_in_vllm(ask):
    body = CHAT | {"stream": True, "stream_options": {"continuous_usage_stats": True}}
    text = ask("/v1/chat/completions", body).text
    assert '"usage"' not in text
