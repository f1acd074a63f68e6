"""GET /: somebody who only has the address learns what listens there and where to look."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from typing import Any

import pytest
from fastapi import FastAPI

from cluster.model.info import ModelInfo

MakeApp = Callable[..., FastAPI]


def test_root_names_the_program_its_model_and_pages(make_app: MakeApp, call: Any, info: ModelInfo) -> None:
    app = make_app()
    answer = asyncio.run(call(app, "GET", "/"))
    page = answer.json()
    assert answer.status_code == 200
    assert (page["name"], page["model"]) == ("moesaic", info.name) and page["version"]
    assert {"/v1/models", "/status", "/metrics"} <= set(page["links"].values())
    for path in page["links"].values():
        assert asyncio.run(call(app, "GET", path)).status_code not in (404, 405), path


def test_browsers_get_a_page_with_links(make_app: MakeApp, call: Any) -> None:
    answer = asyncio.run(call(make_app(), "GET", "/", headers={"accept": "text/html,*/*;q=0.8"}))
    assert answer.headers["content-type"].startswith("text/html")
    assert '<a href="v1/models">' in answer.text


@pytest.mark.parametrize("accept", ["application/json", "text/html"])
def test_the_model_is_not_told_without_the_key(make_app: MakeApp, call: Any, info: ModelInfo, accept: str) -> None:
    answer = asyncio.run(call(make_app(api_key="secret"), "GET", "/", headers={"accept": accept}))
    assert answer.status_code == 200
    assert info.name not in answer.text


def test_head(make_app: MakeApp, call: Any) -> None:
    assert asyncio.run(call(make_app(), "HEAD", "/")).status_code == 200
