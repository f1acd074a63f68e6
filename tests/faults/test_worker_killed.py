"""The attention worker's process is killed in the middle of an answer."""

from __future__ import annotations

import time

import httpx
import openai
import psutil
import pytest
from live_server import LiveServer, poll, processes_of, running_server

pytestmark = pytest.mark.ray


def _worker_process(server: LiveServer) -> psutil.Process | None:
    for process in processes_of(server.root):
        command = " ".join(process.cmdline())
        if "ServeReplica" in command and "AttentionWorker" in command:
            return process
    return None


def _answers(server: LiveServer) -> bool:
    body = {"model": "moesaic-demo", "prompt": "Once upon a time", "max_tokens": 4}
    try:
        return httpx.post(f"{server.url}/v1/completions", json=body, timeout=30).status_code == 200
    except httpx.TransportError:
        return False


def test_killed_worker_ends_the_stream_with_an_error_and_comes_back() -> None:
    with running_server() as server, openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0) as client:
        stream = client.completions.create(
            model="moesaic-demo",
            prompt="Once upon a time",
            max_tokens=1500,
            stream=True,
            timeout=30,
            extra_body={"ignore_eos": True},
        )
        next(iter(stream))
        victim = _worker_process(server)
        assert victim is not None

        victim.kill()

        killed_s = time.monotonic()
        with pytest.raises(openai.APIError) as raised:
            list(stream)
        assert time.monotonic() - killed_s < 10
        assert "attention worker" in str(raised.value)
        poll(lambda: _answers(server), deadline_s=90, what=lambda: f"answers again; log:\n{server.log}", every_s=1)
        assert server.worker()["phase"] == "ready"
        assert _worker_process(server) not in (None, victim)
