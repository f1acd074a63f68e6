"""JSON calls to a Moesaic server, its error envelope turned into our errors. Knows no terminal."""

from __future__ import annotations

import json
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, cast

from cluster.errors import (
    AuthenticationFailed,
    BodyTooLarge,
    DeadlineExceeded,
    InvalidRequest,
    ModelNotFound,
    MoesaicError,
    NothingToChange,
    Overloaded,
    PermissionDenied,
    Unavailable,
)

if TYPE_CHECKING:
    import httpx

_ERROR_BY_CODE: dict[int, type[MoesaicError]] = {
    400: InvalidRequest,
    401: AuthenticationFailed,
    403: PermissionDenied,
    404: ModelNotFound,
    409: NothingToChange,
    413: BodyTooLarge,
    422: InvalidRequest,
    429: Overloaded,
    504: DeadlineExceeded,
}


def auth_headers(api_key: str | None) -> dict[str, str]:
    """Headers that carry the key, if there is one."""
    return {"Authorization": f"Bearer {api_key}"} if api_key else {}


def fetch_json(
    url: str, path: str, *, api_key: str | None, timeout_s: float = 10.0, accept: tuple[int, ...] = (200,)
) -> dict[str, Any]:
    """GET a JSON object.

    Raises:
        Unavailable: no server there, or it has no such page.
        MoesaicError: what the server answered.
    """
    import httpx

    with translated_http_errors(url):
        response = httpx.get(url.rstrip("/") + path, headers=auth_headers(api_key), timeout=timeout_s)
    return _json_object(url, path, response, accept)


def post_json(
    url: str, path: str, body: dict[str, Any], *, api_key: str | None, timeout_s: float = 10.0
) -> dict[str, Any]:
    """POST a JSON object and read the answer's. Raises as `fetch_json`."""
    import httpx

    with translated_http_errors(url):
        response = httpx.post(url.rstrip("/") + path, json=body, headers=auth_headers(api_key), timeout=timeout_s)
    return _json_object(url, path, response, (200,))


def fetch_model_name(url: str, *, api_key: str | None) -> str:
    """The first model that the server serves."""
    models = cast("list[dict[str, Any]]", fetch_json(url, "/v1/models", api_key=api_key).get("data") or [])
    if not models:
        raise Unavailable(f"the server at {url} serves no model")
    return str(models[0]["id"])


@contextmanager
def translated_http_errors(url: str) -> Generator[None]:
    """Turns httpx's errors into `Unavailable` and `DeadlineExceeded` that name the server."""
    import httpx

    try:
        yield
    except httpx.ConnectError as error:
        raise Unavailable(f"no server answers at {url}; start one with `moesaic serve`, or see --url") from error
    except httpx.TimeoutException as error:
        raise DeadlineExceeded(f"the server at {url} did not answer in time") from error
    except httpx.InvalidURL as error:
        raise InvalidRequest(f"{url!r} is not a URL: {error}") from error
    except httpx.UnsupportedProtocol as error:
        raise InvalidRequest(f"{url!r} is not a URL; it should look like http://127.0.0.1:8000") from error
    except httpx.HTTPError as error:
        raise Unavailable(f"the connection to {url} broke: {error}") from error


def error_of(status_code: int, body: bytes) -> MoesaicError:
    """The error that an answer reports, by its HTTP code and its envelope."""
    message = f"the server answered {status_code}"
    try:
        envelope: object = json.loads(body)
    except ValueError:
        envelope = None
    if isinstance(envelope, dict):
        error = cast("dict[str, Any]", envelope).get("error")
        if isinstance(error, dict):
            message = str(cast("dict[str, Any]", error).get("message") or message)
    return _ERROR_BY_CODE.get(status_code, Unavailable)(message)


def _json_object(url: str, path: str, response: httpx.Response, accept: tuple[int, ...]) -> dict[str, Any]:
    if response.status_code not in accept:
        raise error_of(response.status_code, response.content)
    try:
        return cast("dict[str, Any]", response.json())
    except ValueError as error:
        raise Unavailable(f"{url}{path} did not answer with JSON; is this a Moesaic server?") from error


async def raise_for_answer(response: httpx.Response) -> None:
    """Raise what a streamed response reports, unless it is a success."""
    if response.status_code != 200:
        raise error_of(response.status_code, await response.aread())
