"""The description of the HTTP API that `/openapi.json` gives. Pure: schemas in, one document out; calls no route.

Requests are described by the schemas that check them, pages by the dataclasses that they are made of.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic.json_schema import models_json_schema

from cluster.frontend.generation.chat_messages import NEEDS_CONTENT, TEXT_PARTS
from cluster.frontend.http.scheduler_routes import DrainBody
from cluster.frontend.openai_api.request_fields import StrictModel
from cluster.frontend.openai_api.schema import (
    AbortRequest,
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    ExpertCacheBody,
    TokenizeRequest,
)
from cluster.frontend.openai_api.unsupported import known_parameters, takes_any_value
from cluster.frontend.openapi.schemas import ANSWERS, Schema, a_list, an_object, named, or_null

_REFERENCES = "#/components/schemas/{model}"
_COMMON_ERRORS = (429, 500, 503, 504)  # a proxy before us may answer with these, whatever the route
_BODY_ERRORS = (400, 413, 415)
_MEANINGS = {
    400: "The request is malformed or out of range; `param` names the field.",
    401: "The API key is missing or wrong.",
    403: "The route is not for this caller.",
    404: "The model named is not served.",
    409: "The server's configuration does not allow it.",
    413: "The request body is too large.",
    415: "The request body has an unknown type or encoding.",
    422: "The model gave no valid output.",
    429: "Too much is waiting; come back after `Retry-After` seconds.",
    500: "The server failed; its log has the details.",
    503: "Starting, draining, or a process was lost; come back after `Retry-After` seconds.",
    504: "The request's time ran out.",
}
_SHORT_TEXT: Schema = {"type": "string", "minLength": 1, "maxLength": 1024}
_TEXT_PART = an_object({"type": {"enum": list(TEXT_PARTS)}, "text": {"type": "string"}})
_CONTENT: Schema = {"anyOf": [{"type": "string"}, a_list({"anyOf": [{"type": "string"}, _TEXT_PART]})]}
_NO_TOOLS_CALLED: Schema = {
    "anyOf": [
        {"properties": {"tools": {"enum": [None, []]}, "tool_choice": {"enum": [None, "none", "auto"]}}},
        an_object({"tool_choice": {"const": "none"}}),
    ]
}
_STOP = {"anyOf": [_SHORT_TEXT, {**a_list(_SHORT_TEXT), "maxItems": 16}, {"type": "null"}]}
_BIAS = or_null(
    {
        "type": "object",
        "maxProperties": 1024,
        "propertyNames": {"pattern": "^[0-9]{1,18}$"},
        "additionalProperties": {"type": "number", "minimum": -100, "maximum": 100},
    }
)
_OPEN_BODIES = ("ChatRequest", "CompletionRequest", "TokenizeRequest")
_BODIES = (
    ChatRequest,
    CompletionRequest,
    TokenizeRequest,
    DetokenizeRequest,
    AbortRequest,
    ExpertCacheBody,
    DrainBody,
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Operation:
    """One route. `answer` names a schema of the document; None: text of the type `media`. `stream` names the schema of
    each server-sent event, where a stream can be asked for."""

    path: str
    summary: str
    answer: str | None
    method: str = "get"
    media: str = "application/json"
    body: type[StrictModel] | None = None
    stream: str | None = None
    errors: tuple[int, ...] = ()


def openapi_document(
    operations: Sequence[Operation],
    *,
    version: str,
    pages: Mapping[str, Schema],
    guarded: Sequence[str] | None,
    is_strict: bool,
    vocab_size: int,
    root_path: str = "",
) -> dict[str, Any]:
    """The document.

    Args:
        pages: schemas of answers beyond those that are always there, by name.
        guarded: what needs a key, as the beginnings of paths; None: nothing does.
        is_strict: whether unknown fields are refused.
        root_path: prefix of all paths for who comes through a proxy.
    """
    paths: dict[str, dict[str, Any]] = {}
    for operation in operations:
        methods = paths.setdefault(operation.path, {})
        is_guarded = guarded is not None and any(_is_below(operation.path, root) for root in guarded)
        methods[operation.method] = _described(operation, is_guarded=is_guarded)
        if operation.method == "get":
            methods["head"] = _described(operation, is_guarded=is_guarded, is_head=True)
    keys = {
        "bearer": {"type": "http", "scheme": "bearer"},
        "apiKey": {"type": "apiKey", "in": "header", "name": "X-Api-Key"},
    }
    return {
        "openapi": "3.1.0",
        "info": {"title": "Moesaic", "version": version, "description": "OpenAI's API, and what operators ask."},
        "servers": [{"url": root_path or "/"}],
        "paths": paths,
        "components": {
            "schemas": {**ANSWERS, **pages, **_bodies(vocab_size, is_strict=is_strict)},
            "securitySchemes": keys if guarded is not None else {},
        },
    }


def _described(operation: Operation, *, is_guarded: bool, is_head: bool = False) -> dict[str, Any]:
    codes = {*_COMMON_ERRORS, *operation.errors, *(_BODY_ERRORS if operation.body else ())}
    codes |= {401} if is_guarded else set()
    headers: dict[str, Any] = {"x-request-id": {"schema": {"type": "string"}}}
    found = dict(headers)
    if operation.body is not None:
        found["x-moesaic-ignored-fields"] = {
            "schema": {"type": "string"},
            "description": "Paths of fields of the body that were not known.",
        }
    content: dict[str, Any] = {
        operation.media: {"schema": named(operation.answer) if operation.answer else {"type": "string"}}
    }
    if operation.stream is not None:
        # Of each event. The media type of its data would be false of the last one's, which is no JSON.
        data = {"anyOf": [{"const": "[DONE]"}, {"type": "string", "contentSchema": named(operation.stream)}]}
        content["text/event-stream"] = {"schema": an_object({"data": data})}
    if operation.path == "/":
        content["text/html"] = {"schema": {"type": "string"}}
    responses: dict[str, Any] = {"200": {"description": "The answer.", "headers": found}}
    if not is_head:
        responses["200"]["content"] = content
    for code in sorted(codes):
        error_headers = dict(headers)
        if code in (429, 503):
            error_headers["Retry-After"] = {"schema": {"type": "integer", "minimum": 1}}
        responses[str(code)] = {"description": _MEANINGS[code], "headers": error_headers}
        if not is_head:
            schema = named("Error")
            if operation.answer in ("Health", "Readiness") and code == 503:
                schema = {"anyOf": [named(operation.answer), schema]}
            responses[str(code)]["content"] = {"application/json": {"schema": schema}}
    described: dict[str, Any] = {
        "operationId": _operation_id(operation, is_head=is_head),
        "summary": operation.summary,
        "responses": responses,
    }
    if operation.body is not None:
        described["requestBody"] = {
            "required": True,
            "description": "UTF-8; Content-Encoding gzip and deflate are understood.",
            "content": {"application/json": {"schema": named(operation.body.__name__)}},
        }
    if "{model}" in operation.path:
        parameter = {"name": "model", "in": "path", "required": True, "schema": {"type": "string", "minLength": 1}}
        described["parameters"] = [parameter]
    if is_guarded:
        described["security"] = [{"bearer": []}, {"apiKey": []}]
    return described


def _bodies(vocab_size: int, *, is_strict: bool) -> dict[str, Schema]:
    """Schemas of bodies, with what the code checks before or after a schema sees it."""
    _, defined = models_json_schema([(body, "validation") for body in _BODIES], ref_template=_REFERENCES)
    schemas: dict[str, Schema] = defined["$defs"]
    ids = a_list({"type": "integer", "minimum": 0, "exclusiveMaximum": vocab_size})
    texts = a_list({"type": "string", "minLength": 1})
    several = {"minItems": 1, "maxItems": 128}
    prompts = [{"type": "string", "minLength": 1}, texts | several, ids | {"minItems": 1}]
    prompts.append(a_list(ids | {"minItems": 1}) | several)
    schemas["CompletionRequest"]["properties"] |= {
        "prompt": {"anyOf": prompts},
        "best_of": {"description": "Only what n is.", "enum": [None, 1]},
    }
    schemas["DetokenizeRequest"]["properties"]["tokens"] = ids
    schemas["Message"]["properties"]["content"] = or_null(_CONTENT)
    silent_role = {"role": {"not": {"enum": list(NEEDS_CONTENT)}}}
    schemas["Message"]["anyOf"] = [an_object({"content": _CONTENT}), an_object(silent_role)]
    for model in ("ChatRequest", "TokenizeRequest"):
        schemas[model]["allOf"] = [_NO_TOOLS_CALLED]
    schemas["TokenizeRequest"]["oneOf"] = [
        an_object({"prompt": {"type": "string"}}, {"messages": {"type": "null"}}),
        an_object({"messages": {"type": "array"}}, {"prompt": {"type": "null"}}),
    ]
    for model in _OPEN_BODIES:
        properties = schemas[model]["properties"]
        for name, neutral in known_parameters().items():
            properties.setdefault(name, _unserved(name, neutral))
        if "stop" in properties:
            properties |= {"stop": _STOP, "logit_bias": _BIAS}
            properties["stop_token_ids"] = or_null(ids | {"maxItems": 128})
            properties["allowed_token_ids"] = or_null(ids | {"minItems": 1})
    for schema in schemas.values() if is_strict else ():
        if schema.get("additionalProperties") is True:
            schema["additionalProperties"] = False
    return schemas


def _unserved(name: str, neutral: tuple[object, ...]) -> Schema:
    if takes_any_value(name):
        return {"description": "Accepted; changes no answer."}
    return {"description": "Not served: only values that ask for nothing.", "enum": [None, "", [], {}, *neutral]}


def _operation_id(operation: Operation, *, is_head: bool) -> str:
    words = [word.strip("{}") for word in operation.path.replace("_", "/").split("/") if word]
    return "_".join(["head" if is_head else operation.method, *words])


def _is_below(path: str, root: str) -> bool:
    return path == root or path.startswith(root + "/")
