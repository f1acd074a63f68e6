"""Bad input over a real connection: a clear error each time, and the next request is answered."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from live_server import LiveServer

pytestmark = pytest.mark.ray

CHAT = "/v1/chat/completions"
GOOD: dict[str, Any] = {
    "model": "moesaic-demo",
    "messages": [{"role": "user", "content": "hello"}],
    "max_tokens": 4,
}


@pytest.fixture
def http(server: LiveServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as session:
        yield session
        assert session.post(CHAT, json=GOOD).status_code == 200


def _error(answer: httpx.Response, code: int) -> dict[str, Any]:
    assert answer.status_code == code, answer.text
    error = answer.json()["error"]
    assert set(error) >= {"message", "type", "param", "code"}
    return error


def test_five_megabytes_are_refused(http: httpx.Client) -> None:
    body = {**GOOD, "messages": [{"role": "user", "content": "x" * 5_000_000}]}

    assert "4194304" in _error(http.post(CHAT, json=body), 413)["message"]


def test_five_megabytes_in_chunks_are_refused(http: httpx.Client) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(80):
            yield b" " * 65_536

    try:
        answer = http.post(CHAT, content=chunks())
    except httpx.WriteError:  # refused while we were still sending
        return
    _error(answer, 413)


@pytest.mark.parametrize("content", [b"{", b"\xff\xfe{}", b"[]", b""])
def test_malformed_json_is_named(http: httpx.Client, content: bytes) -> None:
    assert _error(http.post(CHAT, content=content), 400)["type"] == "invalid_request_error"


def test_unknown_model_is_404(http: httpx.Client) -> None:
    error = _error(http.post(CHAT, json={**GOOD, "model": "gpt-7"}), 404)

    assert error["code"] == "model_not_found"
    assert "gpt-7" in error["message"] and "moesaic-demo" in error["message"]


def test_too_long_prompt_has_both_numbers(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"model": "moesaic-demo", "prompt": [5] * 3000, "max_tokens": 4})

    error = _error(answer, 400)
    assert error["code"] == "context_length_exceeded"
    assert "2048" in error["message"] and "3000" in error["message"]


def test_early_errors_of_a_stream_have_their_own_status(http: httpx.Client) -> None:
    assert _error(http.post(CHAT, json={**GOOD, "stream": True, "max_tokens": 0}), 400)["param"] == "max_tokens"
