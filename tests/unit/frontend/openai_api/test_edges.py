"""What clients of all kinds send around a request: HEAD, CORS, keys, models, and what the server says of itself."""

from __future__ import annotations

import asyncio
import json

import httpx
import jsonschema
import pytest
from fakes import FakeAttentionWorker

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 3}
ORIGIN = "https://chat.example.org"


def _document(make_app, call, **config):
    response = asyncio.run(call(make_app(**config), "GET", "/openapi.json"))
    assert response.status_code == 200
    return response.json()


def _fits(document, schema, value):
    whole = {"$ref": f"#/components/schemas/{schema}", "components": document["components"]}
    jsonschema.Draft202012Validator(whole).validate(value)


def test_every_page_can_be_asked_for_its_head(make_app, call):
    async def scenario():
        app = make_app()
        paths = [route.path for route in app.routes if "GET" in route.methods]
        for path in paths:
            path = path.replace("{model:path}", "moesaic-demo")
            head, get = await call(app, "HEAD", path), await call(app, "GET", path)
            assert head.status_code == get.status_code, path
            assert head.headers["content-type"] == get.headers["content-type"]
        return paths

    assert len(asyncio.run(scenario())) > 10


def test_no_model_means_the_one_there_is(make_app, call):
    async def scenario():
        app = make_app()
        for model in ({}, {"model": None}, {"model": "moesaic-demo"}):
            for path, body in (
                ("/v1/chat/completions", CHAT),
                ("/v1/completions", {"prompt": "hi", "max_tokens": 2}),
                ("/tokenize", {"prompt": "hi"}),
                ("/detokenize", {"tokens": [5]}),
            ):
                response = await call(app, "POST", path, json=body | model)
                assert response.status_code == 200, response.text
                assert response.json().get("model", "moesaic-demo") == "moesaic-demo"

    asyncio.run(scenario())


def test_the_model_card_has_what_clients_look_for(make_app, call):
    (card,) = asyncio.run(call(make_app(), "GET", "/v1/models")).json()["data"]
    assert (card["root"], card["parent"]) == ("moesaic-demo", None)
    assert card["permission"][0]["allow_sampling"] is True
    assert card == asyncio.run(call(make_app(), "GET", "/v1/models/moesaic-demo")).json()


def test_tokenizer_info_is_the_checkpoints(make_app, call, info):
    facts = asyncio.run(call(make_app(), "GET", "/tokenizer_info")).json()
    config = json.loads((info.path / "tokenizer_config.json").read_text())
    assert {name: facts[name] for name in config if name != "chat_template"} == {
        name: value for name, value in config.items() if name != "chat_template"
    }
    assert "messages" in facts["chat_template"]
    refused = asyncio.run(call(make_app(api_key="secret"), "GET", "/tokenizer_info"))
    assert refused.status_code == 401


def test_pages_of_other_origins_are_let_in_only_by_setting(make_app, call):
    preflight = {
        "Origin": ORIGIN,
        "Access-Control-Request-Method": "POST",
        "Access-Control-Request-Headers": "authorization,content-type,x-api-key",
    }

    async def ask(origins, method, headers, **arguments):
        app = make_app(cors_origins=origins, api_key="secret")
        return await call(app, method, "/v1/chat/completions", headers=headers, **arguments)

    async def scenario():
        for origins, origin in (((ORIGIN,), ORIGIN), (("*",), "*")):
            before = await ask(origins, "OPTIONS", preflight)
            assert before.status_code == 200, "a preflight has no key"
            assert before.headers["access-control-allow-origin"] == origin
            assert "x-api-key" in before.headers["access-control-allow-headers"].lower()
            for key, status in (("secret", 200), ("wrong", 401)):
                headers = {"Origin": ORIGIN, "X-Api-Key": key}
                answer = await ask(origins, "POST", headers, json=CHAT)
                assert answer.status_code == status
                assert answer.headers["access-control-allow-origin"] == origin, "an error can be read, too"
                assert "x-request-id" in answer.headers["access-control-expose-headers"]
        for origins in ((), ("https://other.example.org",)):
            before = await ask(origins, "OPTIONS", preflight)
            answer = await ask(origins, "POST", {"Origin": ORIGIN, "X-Api-Key": "secret"}, json=CHAT)
            for response in (before, answer):
                assert "access-control-allow-origin" not in response.headers

    asyncio.run(scenario())


def test_the_document_has_every_route_and_method(make_app, call):
    described = {
        (path, method.upper()) for path, methods in _document(make_app, call)["paths"].items() for method in methods
    }
    served = {(route.path.replace(":path", ""), method) for route in make_app().routes for method in route.methods}
    assert described == served


def test_the_document_refers_only_to_what_it_has(make_app, call):
    document = _document(make_app, call)
    text = json.dumps(document)
    names = {part.split('"')[0] for part in text.split('"#/components/schemas/')[1:]}
    assert names <= set(document["components"]["schemas"])
    for schema in document["components"]["schemas"].values():
        jsonschema.Draft202012Validator.check_schema(schema)


def test_the_document_knows_keys_and_strictness(make_app, call):
    plain, guarded = _document(make_app, call), _document(make_app, call, api_key="secret", strict=True)
    chat = "/v1/chat/completions"
    assert "security" not in plain["paths"][chat]["post"]
    assert guarded["paths"][chat]["post"]["security"] == [{"bearer": []}, {"apiKey": []}]
    assert "security" not in guarded["paths"]["/health"]["get"]
    for document, is_open in ((plain, True), (guarded, False)):
        assert document["components"]["schemas"]["ChatRequest"]["additionalProperties"] is is_open


@pytest.mark.parametrize(
    ("path", "schema"),
    [
        ("/v1/models", "ModelList"),
        ("/tokenizer_info", "TokenizerInfo"),
        ("/health", "Health"),
        ("/ready", "Readiness"),
        ("/experts", "ExpertsPage"),
        ("/status", "StatusPage"),
        ("/version", "Version"),
        ("/", "RootPage"),
        ("/nothing", "Error"),
    ],
)
def test_pages_are_as_described(make_app, call, path, schema):
    worker = FakeAttentionWorker()
    answer = asyncio.run(call(make_app(worker), "GET", path)).json()
    _fits(_document(make_app, call), schema, answer)


@pytest.mark.parametrize("extra", [{}, {"logprobs": True, "top_logprobs": 2}, {"n": 2, "return_token_ids": True}])
@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_answers_are_as_described(make_app, call, path, stream, extra):
    is_chat = path.endswith("chat/completions")
    body = {"messages": CHAT["messages"]} if is_chat else {"prompt": "hi"}
    if not is_chat and "logprobs" in extra:
        extra = {"logprobs": 2, "echo": True}
    options = {"stream_options": {"include_usage": True}} if stream else {}
    document = _document(make_app, call)
    request = {**body, "max_tokens": 3, "stream": stream, **options, **extra}
    _fits(document, "ChatRequest" if is_chat else "CompletionRequest", request)
    response: httpx.Response = asyncio.run(call(make_app(), "POST", path, json=request))
    assert response.status_code == 200, response.text
    parts = [json.loads(line[6:]) for line in response.text.splitlines() if line.startswith("data: {")]
    schema = ("ChatCompletionChunk" if stream else "ChatCompletion") if is_chat else "Completion"
    for part in parts if stream else [response.json()]:
        _fits(document, schema, part)


@pytest.mark.parametrize(
    "wrong",
    [
        {"messages": []},
        {"messages": [{"role": "user", "content": 5}]},
        {"temperature": 3},
        {"stop": [""]},
        {"stop": ["x"] * 17},
        {"logit_bias": {"five": 1}},
        {"logit_bias": {"5": 101}},
        {"tools": [{}]},
        {"tools": [{}], "tool_choice": "auto"},
        {"tool_choice": "required"},
        {"response_format": {"type": "json_object"}},
        {"n": 0},
    ],
)
def test_what_the_server_refuses_the_document_refuses(make_app, call, wrong):
    document = _document(make_app, call)
    with pytest.raises(jsonschema.ValidationError):
        _fits(document, "ChatRequest", CHAT | wrong)
    assert asyncio.run(call(make_app(), "POST", "/v1/chat/completions", json=CHAT | wrong)).status_code == 400


def test_docs_need_nothing_from_elsewhere(make_app, call):
    page = asyncio.run(call(make_app(), "GET", "/docs"))
    assert page.headers["content-type"].startswith("text/html")
    for elsewhere in ("http://", "https://", "<script", "<link", 'src="', "@import"):
        assert elsewhere not in page.text
    for path in _document(make_app, call)["paths"]:
        assert f"<code>{path}</code>" in page.text
