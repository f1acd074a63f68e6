"""What probes, dashboards and the command line see of a real server."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor

import httpx
import pytest
from live_server import COMMAND, LiveServer, clean_environment, poll

pytestmark = pytest.mark.ray


def _moesaic(*arguments: str) -> str:
    """Standard output of a command that must succeed."""
    run = subprocess.run(
        [str(COMMAND), *arguments], env=clean_environment(), capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    return run.stdout


def test_health_and_ready(server: LiveServer) -> None:
    assert server.get("/health") == {"status": "ok", "failed_steps": 0}
    assert server.get("/ready") == {"phase": "ready", "error": None}


def test_metrics_are_prometheus_text(server: LiveServer) -> None:
    answer = httpx.get(f"{server.url}/metrics", timeout=20)

    assert answer.headers["content-type"].startswith("text/plain")
    samples = [line for line in answer.text.splitlines() if line.startswith("moesaic_")]
    assert samples
    for sample in samples:
        float(sample.rsplit(" ", 1)[1])


def test_status_tells_of_a_healthy_worker(server: LiveServer) -> None:
    worker = server.worker()

    assert worker["phase"] == "ready"
    assert worker["dtype"] == "float32"
    assert worker["degraded"] == [], "no compiled kernel, no O_DIRECT or no Valkey on this machine"
    memory = worker["expert_memory"]
    assert 0 <= memory["resident_bytes"] <= memory["budget_bytes"]
    assert memory["num_experts"] == 12 * 32


def test_experts_count_hits_and_activations(server: LiveServer) -> None:
    body = {"model": "moesaic-demo", "prompt": "Once upon a time", "max_tokens": 8}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()

    page = server.get("/experts")
    (worker,) = page["workers"]

    assert [layer["layer"] for layer in worker["layers"]] == list(range(12))
    for layer in worker["layers"]:
        assert layer["num_experts"] == 32
        for phase in ("prefill", "decode"):
            assert len(layer["activations"][phase]) == 32
            assert sum(layer["activations"][phase]) > 0
        assert layer["hits"] + layer["misses"] > 0
        assert set(layer["resident"]) <= set(range(32))


def test_expert_memory_tells_tiers_and_adds_up(server: LiveServer) -> None:
    body = {"model": "moesaic-demo", "prompt": "Once upon a time", "max_tokens": 8}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()

    (worker,) = server.get("/experts")["workers"]
    memory, layers = worker["memory"], worker["layers"]

    assert (memory["eviction"], memory["prediction"]) == ("moesaic", "moesaic")
    tiers = {tier["tier"]: tier for tier in memory["tiers"]}
    assert list(tiers) == ["device", "disk"]
    assert tiers["device"]["budget_bytes"] == memory["budget_bytes"]
    assert tiers["disk"]["budget_bytes"] is None
    assert tiers["disk"]["bytes_moved"] == memory["bytes_read"] > 0
    assert sum(memory["misses_by_tier"].values()) == memory["misses"] > 0
    for name in ("hits", "misses", "late", "prefetch_used", "prefetch_wasted", "prefetch_dropped"):
        assert sum(layer[name] for layer in layers) == memory[name], name
    assert sum(len(layer["resident"]) for layer in layers) == memory["num_resident"]

    text = httpx.get(f"{server.url}/metrics", timeout=20).text
    label = f'process="worker-{worker["id"]}"'
    assert f'moesaic_expert_cache_misses_total{{{label},tier="disk"}} {float(memory["misses"])}' in text
    assert f"moesaic_expert_search_ratio{{{label}}}" in text


def test_cluster_wide_counts_become_the_only_workers(server: LiveServer) -> None:
    """Through the shared store, in batches, and each by its phase."""

    def are_equal() -> bool:
        page = server.get("/experts")
        (worker,) = page["workers"]
        assert page["cluster"]["degraded"] is None
        own = [{"layer": layer["layer"], "activations": layer["activations"]} for layer in worker["layers"]]
        return page["cluster"]["layers"] == own

    poll(are_equal, deadline_s=60, what="the worker's counts in the cluster's")


def test_status_command_prints_json(server: LiveServer) -> None:
    state = json.loads(_moesaic("status", "--url", server.url, "--json"))

    assert state["ready"]["phase"] == "ready"
    assert state["workers"][0]["model"] == "moesaic-demo"
    assert len(state["experts"][0]["layers"]) == 12


def test_bench_command_measures_the_server(server: LiveServer) -> None:
    flags = ["--num-requests", "4", "--concurrency", "2", "--max-tokens", "8", "--json"]

    report = json.loads(_moesaic("bench", "serve", "--url", server.url, *flags))

    assert report["model"] == "moesaic-demo"
    assert report["num_completed"] == 4, report


def test_generate_command_uses_the_server(server: LiveServer) -> None:
    flags = ["--prompt", "Once upon a time", "--max-tokens", "8", "--temperature", "0", "--json"]

    answer = json.loads(_moesaic("generate", "--url", server.url, *flags))

    assert answer["text"]
    assert answer["finish_reason"] in ("length", "stop")


def test_the_cache_shrinks_and_grows_while_requests_run(server: LiveServer) -> None:
    before = server.get("/experts")["workers"][0]["memory"]["budget_bytes"]

    def ask(i: int) -> str:
        answer = httpx.post(
            f"{server.url}/v1/completions",
            json={"model": "moesaic-demo", "prompt": f"{i} is a number", "max_tokens": 24},
            timeout=120,
        )
        assert answer.status_code == 200, answer.text
        return answer.json()["choices"][0]["finish_reason"]

    with ThreadPoolExecutor(4) as pool:
        reasons = [pool.submit(ask, i) for i in range(4)]
        small = httpx.post(f"{server.url}/experts/cache", json={"cache": "5%"}, timeout=30)
        assert {reason.result() for reason in reasons} <= {"length", "stop"}

    assert small.status_code == 200, small.text
    memory = server.get("/experts")["workers"][0]["memory"]
    assert memory["num_resident"] <= 384 * 5 // 100
    assert memory["resident_bytes"] <= memory["budget_bytes"] == small.json()["workers"][0]["memory"]["budget_bytes"]
    for wrong in ("1%", "lots"):
        refused = httpx.post(f"{server.url}/experts/cache", json={"cache": wrong}, timeout=30)
        assert refused.status_code == 400, refused.text
    again = httpx.post(f"{server.url}/experts/cache", json={"cache": str(before)}, timeout=30)
    assert again.json()["workers"][0]["memory"]["budget_bytes"] == before


def test_a_client_that_offers_http2_is_answered_and_named_once(server: LiveServer) -> None:
    body = b'{"prompt": "Once upon a time", "max_tokens": 2}'
    head = (
        "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade, HTTP2-Settings\r\nUpgrade: h2c\r\n"
        "HTTP2-Settings: AAEAAEAAAAIAAAABAAMAAABkAAQBAAAAAAUAAEAA\r\nContent-Type: application/json\r\n"
        f"X-Request-Id: offers-http2\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    with socket.create_connection(("127.0.0.1", server.port), timeout=60) as connection:
        for _ in range(2):
            connection.sendall(head.encode() + body)
            answer = http.client.HTTPResponse(connection)
            answer.begin()
            assert answer.status == 200
            assert answer.headers.get_all("x-request-id") == ["offers-http2"]
            assert json.loads(answer.read())["usage"]["completion_tokens"] == 2
