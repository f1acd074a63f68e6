"""Who is let in: the key, and a queue that has an end."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from live_server import LiveServer, poll, running_server

pytestmark = pytest.mark.ray

KEY = "sesame"
BODY = {"model": "moesaic-demo", "prompt": "Once upon a time", "max_tokens": 4}


@pytest.fixture(scope="module")
def narrow_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    """One request at a time, none may wait, and only with the key."""
    config: Path = tmp_path_factory.mktemp("config") / "config.yaml"
    config.write_text(f"attention:\n  max_running: 1\nfrontend:\n  api_key: {KEY}\n")
    with running_server("--config", str(config), "--max-queue", "0") as live:
        yield live


def _post(server: LiveServer, key: str | None = KEY) -> httpx.Response:
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    return httpx.post(f"{server.url}/v1/completions", json=BODY, headers=headers, timeout=60)


@pytest.mark.parametrize("key", [None, "open"])
def test_without_the_key_401(narrow_server: LiveServer, key: str | None) -> None:
    answer = _post(narrow_server, key)

    assert answer.status_code == 401
    assert answer.json()["error"]["code"] == "invalid_api_key"
    assert KEY not in answer.text


def test_with_the_key_200(narrow_server: LiveServer) -> None:
    assert _post(narrow_server).status_code == 200


def test_probes_need_no_key(narrow_server: LiveServer) -> None:
    assert narrow_server.get("/ready")["phase"] == "ready"


def test_second_request_is_refused_and_the_first_undisturbed(narrow_server: LiveServer) -> None:
    with openai.OpenAI(base_url=f"{narrow_server.url}/v1", api_key=KEY, max_retries=0, timeout=120) as client:
        stream = client.completions.create(
            model="moesaic-demo",
            prompt="Once upon a time",
            max_tokens=200,
            stream=True,
            stream_options={"include_usage": True},
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))

        refused = _post(narrow_server)

        assert refused.status_code == 429
        assert int(refused.headers["retry-after"]) >= 1
        assert refused.json()["error"]["type"] == "rate_limit_error"
        usages = [chunk.usage for chunk in stream if chunk.usage is not None]
        assert usages[-1].completion_tokens == 200
    poll(lambda: _post(narrow_server).status_code == 200, deadline_s=30, what="room again")


@pytest.mark.parametrize("stream", [False, True])
def test_choices_are_taken_all_or_none(narrow_server: LiveServer, stream: bool) -> None:
    body = {**BODY, "n": 2, "stream": stream, "max_tokens": 200, "ignore_eos": True}
    headers = {"Authorization": f"Bearer {KEY}"}

    refused = httpx.post(f"{narrow_server.url}/v1/completions", json=body, headers=headers, timeout=60)

    assert refused.status_code == 429, refused.text
    assert refused.json()["error"]["type"] == "rate_limit_error"
    poll(lambda: _post(narrow_server).status_code == 200, deadline_s=30, what="room again")
