"""GET /: what listens here and where to look, for people and programs that only have the address. Knows no worker."""

from __future__ import annotations

import html
from collections.abc import Awaitable, Callable
from importlib import metadata

import orjson
from fastapi import FastAPI
from starlette.requests import Request
from starlette.responses import HTMLResponse, Response

from cluster.model.info import ModelInfo

_WHAT = "Moesaic, a distributed server for Mixture-of-Experts language models, with OpenAI's API"
_LINKS = {
    "api": "/v1/models",
    "docs": "/docs",
    "openapi": "/openapi.json",
    "ready": "/ready",
    "status": "/status",
    "experts": "/experts",
    "scheduler": "/scheduler",
    "metrics": "/metrics",
}


def program_version() -> str:
    """The installed distribution's."""
    try:
        return metadata.version("moesaic")
    except metadata.PackageNotFoundError:  # run from a checkout
        return "unknown"


def root_page(app: FastAPI, info: ModelInfo, *, tells_model: bool) -> Callable[[Request], Awaitable[Response]]:
    """The route. `tells_model`: whether anybody may know the model's name; else it takes the key, at /v1/models."""

    async def show(request: Request) -> Response:
        paths = {getattr(route, "path", "") for route in app.routes}
        links = {name: path for name, path in _LINKS.items() if path in paths}
        facts = {"name": "moesaic", "what": _WHAT, "version": program_version()}
        if tells_model:
            facts["model"] = info.name
        if "text/html" in request.headers.get("accept", ""):
            return HTMLResponse(_as_html(facts, links))
        page = {**facts, "links": links}
        return Response(orjson.dumps(page, option=orjson.OPT_INDENT_2), media_type="application/json")

    return show


def _as_html(facts: dict[str, str], links: dict[str, str]) -> str:
    """Links are relative, so that they hold behind a path prefix."""
    items = "".join(f'<li><a href="{path[1:]}">{path}</a></li>' for path in links.values())
    model = f"<p>model: {html.escape(facts['model'])}</p>" if "model" in facts else ""
    title = f"moesaic {html.escape(facts['version'])}"
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<h1>{title}</h1><p>{html.escape(facts['what'])}</p>{model}<ul>{items}</ul></html>"
    )
