"""An application below a prefix, as a second one on the same Serve is: nothing of what guards it is lost."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import httpx
import pytest
from fastapi import FastAPI

from cluster.frontend.http.route_path import route_path

_CHAT = {"model": "moesaic-demo", "messages": [{"role": "user", "content": "a"}], "max_tokens": 2}


async def _call(app: FastAPI, method: str, path: str, **arguments: Any) -> httpx.Response:
    transport = httpx.ASGITransport(app, root_path="/second")  # as Serve sets it; the path keeps the prefix
    async with httpx.AsyncClient(transport=transport, base_url="http://test/second") as client:
        return await client.request(method, path, **arguments)


def test_the_key_is_asked_for_below_a_prefix_too(make_app: Callable[..., FastAPI]) -> None:
    async def scenario() -> None:
        app = make_app(api_key="secret")
        for path in ("/v1/models", "/v1/chat/completions", "/experts", "/status", "/tokenize", "/abort_requests"):
            assert (await _call(app, "GET", path)).status_code == 401, path
        headers = {"Authorization": "Bearer secret"}
        assert (await _call(app, "POST", "/v1/chat/completions", json=_CHAT, headers=headers)).status_code == 200
        assert (await _call(app, "GET", "/health")).status_code == 200

    asyncio.run(scenario())


def test_a_draining_application_takes_nothing_below_its_prefix(make_app: Callable[..., FastAPI]) -> None:
    async def scenario() -> None:
        app = make_app()
        app.state.requests.begin_drain()
        assert (await _call(app, "POST", "/v1/chat/completions", json=_CHAT)).status_code == 503

    asyncio.run(scenario())


@pytest.mark.parametrize(
    ("path", "root", "expected"),
    [
        ("/v1/models", "", "/v1/models"),
        ("/v1/models", "/", "/v1/models"),
        ("/a/v1/models", "/a", "/v1/models"),
        ("/a/v1/models", "/a/", "/v1/models"),
        ("/a", "/a", "/"),
        ("/ab/v1", "/a", "/ab/v1"),
        ("/v1/models", "/a", "/v1/models"),
    ],
)
def test_a_route_is_what_follows_the_prefix(path: str, root: str, expected: str) -> None:
    assert route_path({"type": "http", "path": path, "root_path": root}) == expected
