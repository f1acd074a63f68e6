"""Errors as HTTP responses: one envelope for everything. Knows Starlette and the error table."""

from __future__ import annotations

import math
from collections.abc import Mapping

import orjson
from fastapi import FastAPI
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from cluster.errors import AuthenticationFailed, MoesaicError, Overloaded, Unavailable, codes_of
from cluster.frontend.openai_api.answers import error_json


def error_response(error: BaseException) -> Response:
    """The envelope with the status of the error's class; Retry-After where coming back helps."""
    headers: dict[str, str] = {}
    if isinstance(error, Overloaded | Unavailable):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after_s)))
    if isinstance(error, AuthenticationFailed):
        headers["WWW-Authenticate"] = "Bearer"
    return Response(orjson.dumps(error_json(error)), codes_of(error).http, headers, "application/json")


def unknown_route_response(method: str, path: str) -> Response:
    """There is nothing at this path."""
    return _invalid_request(f"unknown route: {method} {path[:200]}", 404)


def install_error_responses(app: FastAPI) -> None:
    """Answer our errors and Starlette's own (unknown route, wrong method) with the envelope."""
    app.add_exception_handler(MoesaicError, _answer_ours)
    app.add_exception_handler(HTTPException, _answer_starlette)


async def _answer_ours(request: Request, error: Exception) -> Response:
    return error_response(error)


async def _answer_starlette(request: Request, error: Exception) -> Response:
    if not isinstance(error, HTTPException):
        return error_response(error)
    route = f"{request.method} {request.url.path[:200]}"
    message = {404: f"unknown route: {route}", 405: f"method not allowed: {route}"}.get(error.status_code, error.detail)
    return _invalid_request(message, error.status_code, error.headers)


def _invalid_request(message: str, status: int, headers: Mapping[str, str] | None = None) -> Response:
    body = {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}
    return Response(orjson.dumps(body), status, headers, "application/json")
