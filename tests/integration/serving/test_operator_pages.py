"""What probes, dashboards and the command line see of a real server."""

from __future__ import annotations

import http.client
import json
import socket
import subprocess
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
from live_server import COMMAND, LiveServer, clean_environment, poll
from prometheus_client import Metric
from prometheus_client.parser import text_string_to_metric_families

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


_FRONT_END = {  # name: (type, labels)
    "moesaic_request_success": ("counter", {"finished_reason"}),
    "moesaic_time_to_first_token_seconds": ("histogram", set[str]()),
    "moesaic_inter_token_latency_seconds": ("histogram", set[str]()),
    "moesaic_e2e_request_latency_seconds": ("histogram", set[str]()),
    "moesaic_prompt_tokens": ("counter", set[str]()),
    "moesaic_prompt_tokens_cached": ("counter", set[str]()),
    "moesaic_generation_tokens": ("counter", set[str]()),
    "moesaic_http_requests": ("counter", {"route", "code"}),
    "moesaic_num_requests_in_flight": ("gauge", set[str]()),
}
_WORKER = {
    "moesaic_num_requests_running": ("gauge", {"process"}),
    "moesaic_num_requests_waiting": ("gauge", {"process"}),
    "moesaic_kv_cache_usage_ratio": ("gauge", {"process"}),
    "moesaic_expert_cache_hits": ("counter", {"process"}),
    "moesaic_expert_cache_misses": ("counter", {"process", "tier"}),
    "moesaic_expert_load_ratio": ("gauge", {"layer", "phase"}),
}


def _metrics(server: LiveServer) -> dict[str, Metric]:
    answer = httpx.get(f"{server.url}/metrics", timeout=20).raise_for_status()
    assert answer.headers["content-type"].startswith("text/plain")
    return {family.name: family for family in text_string_to_metric_families(answer.text)}


def _total(family: Metric, suffix: str, **labels: str) -> float:
    """Sum of the samples `name + suffix` that have these labels."""
    return sum(s.value for s in family.samples if s.name == family.name + suffix and labels.items() <= s.labels.items())


def test_metrics_have_their_names_types_and_labels(server: LiveServer) -> None:
    body = {"model": "moesaic-demo", "prompt": "Once upon a time", "max_tokens": 4}
    httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
    load = "moesaic_expert_load_ratio"  # of the cluster's counts, which come in batches
    poll(lambda: _metrics(server)[load].samples, deadline_s=30, what=load)
    found = _metrics(server)

    for name, (kind, labels) in (_FRONT_END | _WORKER).items():
        family = found[name]
        assert family.type == kind, name
        assert family.documentation, name
        assert family.samples, name
        assert {label for sample in family.samples for label in sample.labels} - {"le"} == labels, name


def test_metrics_move_with_requests(server: LiveServer) -> None:
    """By exactly what was asked for: this server answers nobody else."""
    prompt, num_tokens, num = "Metrics move with requests, once", 5, 3
    body = {"model": "moesaic-demo", "prompt": prompt, "max_tokens": num_tokens, "ignore_eos": True}
    before = _metrics(server)
    usages = []
    for _ in range(num):
        answer = httpx.post(f"{server.url}/v1/completions", json=body, timeout=60).raise_for_status()
        usages.append(answer.json()["usage"])
    wrong = httpx.post(f"{server.url}/v1/completions", json={**body, "max_tokens": -1}, timeout=60)
    assert wrong.status_code == 400
    cached = sum((usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0) for usage in usages)
    expected = {
        ("moesaic_request_success", "_total", ("finished_reason", "length")): num,
        ("moesaic_generation_tokens", "_total"): num * num_tokens,
        ("moesaic_prompt_tokens", "_total"): sum(usage["prompt_tokens"] for usage in usages),
        ("moesaic_prompt_tokens_cached", "_total"): cached,
        ("moesaic_time_to_first_token_seconds", "_count"): num,
        ("moesaic_e2e_request_latency_seconds", "_count"): num,
        ("moesaic_inter_token_latency_seconds", "_count"): num * (num_tokens - 1),
        ("moesaic_http_requests", "_total", ("route", "/v1/completions"), ("code", "200")): num,
        ("moesaic_http_requests", "_total", ("route", "/v1/completions"), ("code", "400")): 1,
    }
    moved: dict[Any, float] = {}

    def have_moved() -> bool:
        after = _metrics(server)
        for name, suffix, *labels in expected:
            now, then = (_total(page[name], suffix, **dict(labels)) for page in (after, before))
            moved[name, suffix, *labels] = now - then
        return moved == expected and _total(after["moesaic_num_requests_in_flight"], "") == 0

    poll(have_moved, deadline_s=20, what=lambda: f"{expected}; there is {moved}")
    misses, hits = (f"moesaic_expert_cache_{kind}" for kind in ("misses", "hits"))
    after = _metrics(server)
    assert sum(_total(after[name], "_total") - _total(before[name], "_total") for name in (hits, misses)) > 0


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
