"""Every kind of bad input: its status, its envelope, and nothing else disturbed."""

from __future__ import annotations

import asyncio
import json

import pytest
from fakes import AsgiCall, FakeAttentionWorker

CHAT = {"model": "moesaic-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
COMPLETION = {"model": "moesaic-demo", "prompt": "hi", "max_tokens": 3}


@pytest.fixture
def refused(make_app, call):
    """Send a bad request; check the envelope, that the worker saw nothing and that a good one still works."""

    def send(status, *, path="/v1/chat/completions", config=None, **arguments):
        worker = FakeAttentionWorker()
        app = make_app(worker, **(config or {}))

        async def scenario():
            response = await call(app, "POST", path, **arguments)
            assert worker.requests == []
            assert (await call(app, "POST", "/v1/chat/completions", json=CHAT)).status_code == 200
            return response

        response = asyncio.run(scenario())
        assert response.status_code == status, response.text
        assert set(response.json()) == {"error"}
        error = response.json()["error"]
        assert set(error) == {"message", "type", "param", "code"}
        return error

    return send


def test_malformed_json(refused):
    error = refused(400, content=b'{"model": ')
    assert "not valid JSON" in error["message"]
    assert error["type"] == "invalid_request_error"


def test_body_that_is_no_object(refused):
    assert "JSON object" in refused(400, content=b"[1]")["message"]


def test_invalid_utf8(refused):
    assert "UTF-8" in refused(400, content=b'{"model": "\xff\xfe"}')["message"]


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("max_tokens", "5"),
        ("max_tokens", 5.5),
        ("max_tokens", True),
        ("temperature", "hot"),
        ("temperature", 2.1),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.1),
        ("min_p", 2),
        ("top_k", 1.5),
        ("seed", "x"),
        ("stream", "yes"),
        ("stop", 7),
        ("stop", [""]),
        ("stop", ["x"] * 17),
        ("messages", "hi"),
        ("top_logprobs", 21),
        ("n", 0),
        ("n", 129),
        ("presence_penalty", 2.5),
        ("frequency_penalty", "much"),
        ("repetition_penalty", 0),
        ("logit_bias", {"5": 101}),
        ("logit_bias", {"5": "x"}),
        ("logit_bias", {"five": 1}),
        ("logit_bias", [5]),
        ("allowed_token_ids", []),
        ("bad_words", "the"),
        ("prompt_logprobs", 21),
        ("truncate_prompt_tokens", 0),
        ("truncate_prompt_tokens", -2),
        ("model", 3),
    ],
)
def test_wrong_types_and_ranges_name_the_field(refused, param, value):
    body = CHAT | {"logprobs": True, param: value}
    assert refused(400, json=body)["param"] == param


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize("param", ["max_tokens", "max_completion_tokens"])
def test_max_tokens_below_one(refused, param, value):
    error = refused(400, json=CHAT | {param: value})
    assert error["param"] == param
    assert str(value) in error["message"]


def test_unknown_model(refused):
    error = refused(404, json=CHAT | {"model": "gpt-9"})
    assert (error["code"], error["param"]) == ("model_not_found", "model")
    assert "gpt-9" in error["message"]


def test_prompt_longer_than_the_context(refused, tokenizer):
    text = "word " * 3000
    num_prompt = len(tokenizer.encode(text))
    error = refused(400, path="/v1/completions", json=COMPLETION | {"prompt": text})
    assert error["code"] == "context_length_exceeded"
    assert str(num_prompt) in error["message"]
    assert "2048" in error["message"]


def test_prompt_and_max_tokens_longer_than_the_context(refused):
    error = refused(400, json=CHAT | {"max_tokens": 2047})
    assert (error["code"], error["param"]) == ("context_length_exceeded", "max_tokens")
    assert "2048" in error["message"]
    assert "2047" in error["message"]


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/chat/completions", CHAT | {"tempratur": 1}, "tempratur"),
        ("/v1/chat/completions", CHAT | {"nothing": None}, "nothing"),
        ("/v1/chat/completions", CHAT | {"messages": [CHAT["messages"][0] | {"colour": "red"}]}, "messages.0.colour"),
        ("/v1/completions", COMPLETION | {"stream": True, "stream_options": {"x": 1}}, "stream_options.x"),
        ("/tokenize", {"prompt": "a", "colour": "red"}, "colour"),
        ("/detokenize", {"tokens": [5], "colour": "red"}, "colour"),
    ],
)
def test_a_strict_server_refuses_unknown_parameters_as_openai(refused, path, body, param):
    error = refused(400, config={"strict": True}, path=path, json=body)
    assert error["message"] == f"Unrecognized request argument supplied: {param}"
    assert error["param"] == param


@pytest.mark.parametrize(
    ("param", "value"),
    [
        ("tools", [{"type": "function"}]),
        ("response_format", {"type": "json_object"}),
        ("best_of", 2),
        ("use_beam_search", True),
        ("detokenize", False),
        ("guided_json", {"type": "object"}),
        ("guided_regex", "a+"),
        ("structured_outputs", {"json": {}}),
        ("structural_tag", "x"),
        ("lora_request", {"name": "x"}),
        ("modalities", ["text", "audio"]),
        ("audio", {"voice": "x"}),
        ("cache_salt", "x"),
        ("documents", [{"title": "x"}]),
    ],
)
def test_unsupported_parameters_name_themselves(refused, param, value):
    error = refused(400, json=CHAT | {param: value})
    assert error["param"] == param
    assert "not supported" in error["message"]


def test_five_megabytes(refused):
    body = json.dumps(CHAT | {"user": "x" * 5 * 2**20}).encode()
    assert str(4 * 2**20) in refused(413, content=body)["message"]


def test_five_megabytes_without_a_declared_length(make_app):
    call = AsgiCall(make_app(), "/v1/chat/completions", chunks=[b"x" * 2**20] * 5)
    asyncio.run(call.run())
    assert call.status == 413
    assert json.loads(call.text)["error"]["type"] == "invalid_request_error"


def test_empty_messages(refused):
    assert refused(400, json=CHAT | {"messages": []})["param"] == "messages"


@pytest.mark.parametrize("missing", ["messages"])
def test_missing_parameters(refused, missing):
    body = {name: value for name, value in CHAT.items() if name != missing}
    error = refused(400, json=body)
    assert error["message"] == f"Missing required parameter: '{missing}'"
    assert error["param"] == missing


@pytest.mark.parametrize(
    "message",
    [
        {"role": "", "content": "hi"},
        {"role": "x" * 65, "content": "hi"},
        {"role": "user"},
        {"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]},
        {"role": "user", "content": 5},
        {"role": "user", "content": [{"type": "input_audio", "input_audio": {}}]},
        {"role": "assistant", "content": "hi", "audio": {"id": "x"}},
        "hi",
    ],
)
def test_bad_messages(refused, message):
    assert refused(400, json=CHAT | {"messages": [message]})["param"].startswith("messages.0")


@pytest.mark.parametrize("prompt", ["", [], [""], [[]], [1, "a"], [[1], "a"], [4096], [-1], 5, None, ["x"] * 129])
def test_bad_prompts(refused, prompt):
    assert refused(400, path="/v1/completions", json=COMPLETION | {"prompt": prompt})["param"] == "prompt"


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"top_logprobs": 2}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"min_tokens": 9}, "min_tokens"),
        ({"stop_token_ids": [9999]}, "stop_token_ids"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"logit_bias": {"4096": 1}}, "logit_bias"),
        ({"allowed_token_ids": [-1]}, "allowed_token_ids"),
        ({"allowed_token_ids": [0, 2], "min_tokens": 1}, "allowed_token_ids"),
        ({"prompt_logprobs": 1, "stream": True}, "prompt_logprobs"),
        ({"truncate_prompt_tokens": -1, "max_tokens": 2048}, "max_tokens"),
    ],
)
def test_contradictions(refused, body, param):
    assert refused(400, json=CHAT | body)["param"] == param


@pytest.mark.parametrize(
    ("body", "param"),
    [({"best_of": 3, "n": 2}, "best_of"), ({"prompt": ["a"] * 65, "n": 2}, "n"), ({"logprobs": 21}, "logprobs")],
)
def test_completions_that_are_too_much(refused, body, param):
    assert refused(400, path="/v1/completions", json=COMPLETION | body)["param"] == param


def test_a_ban_of_everything_allowed_is_refused(refused, tokenizer):
    word = tokenizer.encode(" the")
    error = refused(400, json=CHAT | {"allowed_token_ids": word[-1:], "bad_words": [" the", "the"]})
    assert error["param"] == "allowed_token_ids"


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/tokenize", {}, "prompt"),
        ("/tokenize", {"prompt": "a", "messages": [{"role": "user", "content": "a"}]}, "prompt"),
        ("/tokenize", {"prompt": 5}, "prompt"),
        ("/tokenize", {"prompt": "a", "tools": [{}]}, "tools"),
        ("/abort_requests", {"request_ids": ["a"], "colour": "red"}, "colour"),
        ("/experts/cache", {"cache": "25%", "colour": "red"}, "colour"),
        ("/detokenize", {"tokens": "a"}, "tokens"),
        ("/detokenize", {"tokens": [4096]}, "tokens"),
        ("/detokenize", {}, "tokens"),
        ("/abort_requests", {"request_ids": []}, "request_ids"),
        ("/abort_requests", {"request_ids": [5]}, "request_ids.0"),
    ],
)
def test_bad_bodies_of_the_other_routes(refused, path, body, param):
    assert refused(400, path=path, json=body)["param"] == param


@pytest.mark.parametrize("path", ["/tokenize", "/detokenize"])
def test_other_routes_know_the_model(refused, path):
    body = {"model": "gpt-9", "prompt": "a"} if path == "/tokenize" else {"model": "gpt-9", "tokens": [5]}
    assert refused(404, path=path, json=body)["code"] == "model_not_found"


def test_error_messages_are_bounded(refused):
    many = [{"role": "x" * 20_000, "content": 5}] * 100
    error = refused(400, json=CHAT | {"messages": many})
    assert len(error["message"]) < 5000
    assert "more" in error["message"]
    assert len(refused(400, config={"strict": True}, json=CHAT | {"k" * 50_000: 1})["message"]) < 300
    assert len(refused(404, json=CHAT | {"model": "m" * 50_000})["message"]) < 300


def test_wrong_key(make_app, call):
    async def scenario():
        app = make_app(api_key="secret")
        for headers in ({}, {"Authorization": "Bearer wrong"}, {"Authorization": "secret"}, {"X-Api-Key": "no"}):
            for path in ("/v1/models", "/v1/chat/completions", "/experts", "/status", "/tokenize", "/abort_requests"):
                response = await call(app, "GET", path, headers=headers)
                assert response.status_code == 401
                assert response.json()["error"]["code"] == "invalid_api_key"
                assert response.json()["error"]["type"] == "authentication_error"
        for headers in (
            {"Authorization": "Bearer secret"},
            {"Authorization": "bearer  secret"},
            {"authorization": "BEARER secret"},
            {"X-Api-Key": "secret"},
            {"Authorization": "Bearer EMPTY", "X-Api-Key": "secret"},
        ):
            assert (await call(app, "POST", "/v1/chat/completions", json=CHAT, headers=headers)).status_code == 200
        for path in ("/health", "/ready", "/metrics"):
            assert (await call(app, "GET", path)).status_code == 200

    asyncio.run(scenario())


def test_unknown_route_and_method_have_the_envelope(make_app, call):
    async def scenario():
        app = make_app()
        missing = await call(app, "GET", "/v2/nothing")
        assert missing.status_code == 404
        assert "/v2/nothing" in missing.json()["error"]["message"]
        wrong = await call(app, "GET", "/v1/chat/completions")
        assert wrong.status_code == 405
        assert wrong.json()["error"]["type"] == "invalid_request_error"
        model = await call(app, "GET", "/v1/models/other")
        assert (model.status_code, model.json()["error"]["code"]) == (404, "model_not_found")

    asyncio.run(scenario())
