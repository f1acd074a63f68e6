"""Load that one worker and one expert host cannot serve starts more of both; when it is over, they go."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from live_server import LiveServer, poll, running_server

from cluster.loadgen.prompts import BUNDLED_PROMPTS

pytestmark = [pytest.mark.ray, pytest.mark.timeout(600)]

# Over so slow a link one host spends its time waiting for experts; and one worker runs two of the answers at a time.
CONFIG = """
model: {dtype: float32}
attention: {max_workers: 2, max_running: 2}
experts: {hosts: 1, max_hosts: 2, host_cache: "30%", ram_tier: "100%", link_gb_per_s: 0.05, host_threads: 1}
scheduler: {scale_up_after_s: 1, scale_down_after_s: 15, placement_interval_s: 5, report_interval_s: 0.5}
"""
NUM_CLIENTS = 6


@pytest.fixture
def server(tmp_path: Path) -> Iterator[LiveServer]:
    config = tmp_path / "config.yaml"
    config.write_text(CONFIG)
    with running_server("--config", str(config), "--threads", "1") as live:
        yield live


def test_workers_and_hosts_come_with_load_and_go_without(server: LiveServer) -> None:
    statuses: list[int] = []
    is_over = threading.Event()

    def ask(number: int) -> None:
        while not is_over.is_set():
            statuses.append(_complete(server, BUNDLED_PROMPTS[number % len(BUNDLED_PROMPTS)], 24))
            number += NUM_CLIENTS

    clients = [threading.Thread(target=ask, args=(number,)) for number in range(NUM_CLIENTS)]
    for client in clients:
        client.start()
    try:
        poll(
            lambda: len(_ready(server, "workers")) == 2 and len(_with_experts(server)) == 2,
            deadline_s=200,
            what=lambda: f"two workers, and two hosts that own experts: {server.get('/scheduler')}",
            every_s=1,
        )
    finally:
        is_over.set()
        for client in clients:
            client.join()
    assert set(statuses) == {200}

    poll(
        lambda: len(_ready(server, "workers")) == 1 and len(_ready(server, "hosts")) == 1,
        deadline_s=200,
        what=lambda: f"one worker and one host: {server.get('/scheduler')}",
        every_s=1,
    )
    assert _complete(server, "Once upon a time", 8) == 200


def _complete(server: LiveServer, prompt: str, max_tokens: int) -> int:
    body = {"model": "moesaic-demo", "prompt": prompt, "max_tokens": max_tokens, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).status_code


def _ready(server: LiveServer, kind: str) -> list[dict[str, Any]]:
    return [each for each in server.get("/scheduler")[kind] if each["phase"] == "ready"]


def _with_experts(server: LiveServer) -> list[dict[str, Any]]:
    return [host for host in _ready(server, "hosts") if host["owned"]]
