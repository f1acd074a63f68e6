"""GET /docs: the API's description for people, one page without scripts and without anything from elsewhere."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from typing import Any

_STYLE = (
    "body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem}"
    "code,pre{font:13px/1.5 ui-monospace,monospace}pre{overflow:auto;background:#8881;padding:.5rem}"
    "summary{cursor:pointer;padding:.3rem 0}b{display:inline-block;width:4rem}"
)


def docs_page(document: Mapping[str, Any]) -> str:
    """HTML of an OpenAPI document; links are relative, so that they hold behind a path prefix."""
    info = document["info"]
    operations = "".join(
        _operation(method, path, operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
        if method != "head"
    )
    schemas = "".join(
        f'<details id="{_text(name)}"><summary><code>{_text(name)}</code></summary>{_pre(schema)}</details>'
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    title = _text(f"{info['title']} {info['version']}")
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>{title}</title>'
        f"<style>{_STYLE}</style></head>"
        f'<body><h1>{title}</h1><p>{_text(info["description"])} <a href="openapi.json">openapi.json</a></p>'
        f"<h2>Routes</h2>{operations}<h2>Schemas</h2>{schemas}</body></html>"
    )


def _operation(method: str, path: str, operation: Mapping[str, Any]) -> str:
    head = f"<b>{method.upper()}</b> <code>{_text(path)}</code> {_text(operation['summary'])}"
    body = operation.get("requestBody")
    request = "" if body is None else f"<p>Body: {_links(body['content'])}</p>"
    answers = "".join(
        f"<li>{code}: {_text(answer['description'])} {_links(answer.get('content', {}))}</li>"
        for code, answer in operation["responses"].items()
    )
    return f"<details><summary>{head}</summary>{request}<ul>{answers}</ul></details>"


def _links(content: Mapping[str, Any]) -> str:
    return ", ".join(f"<code>{_text(media)}</code> {_link(kind['schema'])}" for media, kind in content.items())


def _link(schema: Mapping[str, Any]) -> str:
    if "$ref" not in schema:
        return ""
    name = _text(str(schema["$ref"]).rpartition("/")[2])
    return f'<a href="#{name}">{name}</a>'


def _pre(schema: object) -> str:
    return f"<pre>{_text(json.dumps(schema, indent=1))}</pre>"


def _text(text: str) -> str:
    return html.escape(text)
