"""Who may see and change how the server works: keys of clients and operators, and pages of other sites."""

from __future__ import annotations

import asyncio

import pytest

from cluster.config.load import load_config
from cluster.frontend.security.api_keys import Keys, Level
from cluster.frontend.security.cross_site import CrossSite, exposure_notices

READS = ("/experts", "/status", "/scheduler", "/plan", "/diagnose")
CHANGES = ("/experts/cache", "/drain")
CLIENT, OPERATOR = "the client's", "the operator's"


def codes(make_app, call, paths, *, method="GET", key=None, **config):
    """Status codes of the paths; 503 and 400 come from behind the door."""

    async def scenario():
        app = make_app(**config)
        headers = {} if key is None else {"Authorization": f"Bearer {key}"}
        body = None if method == "GET" else {}
        return [(await call(app, method, path, headers=headers, json=body)).status_code for path in paths]

    return set(asyncio.run(scenario()))


@pytest.mark.parametrize(
    ("config", "key", "reads", "changes", "serves"),
    [
        ({}, None, True, True, True),
        ({"api_key": CLIENT}, None, 401, 401, 401),
        ({"api_key": CLIENT}, "wrong", 401, 401, 401),
        ({"api_key": CLIENT}, CLIENT, True, 403, True),
        ({"api_key": CLIENT, "operator_key": OPERATOR}, None, 401, 401, 401),
        ({"api_key": CLIENT, "operator_key": OPERATOR}, CLIENT, 403, 403, True),
        ({"api_key": CLIENT, "operator_key": OPERATOR}, OPERATOR, True, True, True),
        ({"operator_key": OPERATOR}, None, 401, 401, True),
        ({"operator_key": OPERATOR}, OPERATOR, True, True, True),
    ],
)
def test_operator_routes_need_the_operators_key_where_keys_are_set(make_app, call, config, key, reads, changes, serves):
    behind = {200, 400, 503}
    for found, wanted in (
        (codes(make_app, call, READS, key=key, **config), reads),
        (codes(make_app, call, CHANGES, method="POST", key=key, **config), changes),
        (codes(make_app, call, ("/v1/models",), key=key, **config), serves),
    ):
        assert found <= behind if wanted is True else found == {wanted}


def test_every_route_but_these_is_for_clients_or_for_everybody(make_app):
    """A new page about the server must be put on the list, or here."""
    public = {"/", "/health", "/ready", "/metrics", "/load", "/version", "/openapi.json", "/docs"}
    of_clients = ("/v1/", "/tokenize", "/detokenize", "/abort_requests", "/tokenizer_info")
    paths = {route.path for route in make_app().routes} - public - {*READS, *CHANGES}
    assert [path for path in paths if not path.startswith(of_clients)] == []


def test_refusal_says_which_key_is_needed():
    error = Keys(client=CLIENT).refusal(Level.OPERATOR_CHANGES, (CLIENT,), "a header")
    assert error is not None
    assert "set frontend.operator_key" in error.message
    assert CLIENT not in repr(Keys(client=CLIENT, operator=OPERATOR))


JSON = {"host": "127.0.0.1:8000", "content-type": "application/json"}


@pytest.mark.parametrize(
    ("headers", "allowed"),
    [
        (JSON, True),
        (JSON | {"content-type": "application/json; charset=utf-8"}, True),
        (JSON | {"content-type": "text/plain"}, False),
        (JSON | {"content-type": "application/x-www-form-urlencoded"}, False),
        ({"host": "127.0.0.1"}, False),
        (JSON | {"host": "localhost:8000"}, True),
        (JSON | {"host": "[::1]:8000"}, True),
        (JSON | {"host": "10.0.0.7:8000"}, True),
        (JSON | {"host": "experts-serve-svc:8000"}, True),
        (JSON | {"host": "serve.models.svc.cluster.local"}, True),
        (JSON | {"host": "evil.example"}, False),
        (JSON | {"host": ""}, False),
        (JSON | {"host": "[::1"}, False),
        (JSON | {"host": "console.example"}, False),
        (JSON | {"origin": "http://127.0.0.1:8000"}, True),
        (JSON | {"origin": "http://127.0.0.1:9000"}, False),
        (JSON | {"origin": "https://evil.example"}, False),
        (JSON | {"origin": "null"}, False),
        (JSON | {"sec-fetch-site": "same-origin"}, True),
        (JSON | {"sec-fetch-site": "cross-site"}, False),
    ],
)
def test_pages_of_other_sites_are_refused_without_keys(headers, allowed):
    assert (CrossSite().reason(headers, changes=True) is None) == allowed


def test_names_and_pages_can_be_allowed():
    allowed = CrossSite(hosts=("Console.example",), origins=("https://page.example",))
    headers = JSON | {"host": "console.example:443", "origin": "https://page.example"}
    assert allowed.reason(headers, changes=True) is None
    assert "allowed_hosts" in str(allowed.reason(JSON, changes=True)), "only these, then"
    assert CrossSite(has_keys=True).reason(JSON | {"host": "llm.example"}, changes=True) is None
    assert CrossSite(has_keys=True).reason(JSON | {"origin": "https://evil.example"}, changes=True) is not None


@pytest.mark.parametrize("path", [*CHANGES, "/abort_requests"])
def test_form_of_another_page_changes_nothing(make_app, call, path):
    async def scenario():
        app = make_app()
        body = {"content": b'{"node": "n", "cache": "1%", "request_ids": []}'}
        form = await call(app, "POST", path, headers={"Content-Type": "text/plain"}, **body)
        page = await call(
            app, "POST", path, headers={"Content-Type": "application/json", "Origin": "https://evil.example"}, **body
        )
        return form, page

    for answer in asyncio.run(scenario()):
        assert answer.status_code == 403
        assert answer.json()["error"]["code"] == "cross_site"


@pytest.mark.parametrize(
    ("frontend", "grpc", "words"),
    [
        ({}, {}, None),
        ({"host": "::1"}, {}, None),
        ({"host": "localhost"}, {}, None),
        ({"host": "0.0.0.0"}, {}, "0.0.0.0"),
        ({"host": "::"}, {}, "::"),
        ({"host": "10.0.0.7"}, {}, "10.0.0.7"),
        ({}, {"host": "0.0.0.0"}, "0.0.0.0"),
        ({}, {"host": "0.0.0.0", "enabled": False}, None),
        ({"host": "0.0.0.0", "api_key": "k"}, {}, None),
        ({"host": "0.0.0.0", "operator_key": "k"}, {}, "clients"),
    ],
)
def test_open_door_is_told(frontend, grpc, words):
    notices = exposure_notices(load_config(None, {"frontend": frontend, "grpc": grpc}))
    assert bool(notices) == (words is not None)
    if words:
        assert words in notices[0]


def test_notices_show_in_status(make_service, info, metrics, call):
    from fakes import FakeAttentionWorker

    from cluster.config.sections import FrontendConfig
    from cluster.frontend.http.app import create_app

    worker = FakeAttentionWorker()
    app = create_app(make_service(worker), worker, info, FrontendConfig(), metrics, notices=["listens on 0.0.0.0"])
    assert asyncio.run(call(app, "GET", "/status")).json()["notices"] == ["listens on 0.0.0.0"]


def test_server_with_keys_starts(make_app):
    """Serve begins with a lifespan scope, which has no path."""

    async def scenario():
        sent = []
        messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message["type"])

        await make_app(api_key=CLIENT, operator_key=OPERATOR)({"type": "lifespan", "state": {}}, receive, send)
        return sent

    assert asyncio.run(scenario()) == ["lifespan.startup.complete", "lifespan.shutdown.complete"]


@pytest.mark.parametrize("path", ["/status", "/experts", "/scheduler", "/plan", "/diagnose", "/health"])
@pytest.mark.parametrize("method", ["TRACE", "PURGE", "POST", "PUT", "PATCH", "DELETE"])
def test_a_method_that_no_route_has_is_told_so(make_app, call, method, path):
    assert asyncio.run(call(make_app(), method, path, headers={"Host": "127.0.0.1"})).status_code == 405
