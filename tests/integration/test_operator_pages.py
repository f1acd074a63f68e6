"""What probes, dashboards and the command line see of a real server."""

from __future__ import annotations

import json
import subprocess

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
    assert server.get("/health") == {"status": "ok"}
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


def test_cluster_wide_counts_become_the_only_workers(server: LiveServer) -> None:
    """Through the shared store, in batches, and each by its phase."""

    def are_equal() -> bool:
        page = server.get("/experts")
        (worker,) = page["workers"]
        assert page["cluster"]["degraded"] is None
        own = [{"layer": layer["layer"], "activations": layer["activations"]} for layer in worker["layers"]]
        return page["cluster"]["layers"] == own

    poll(are_equal, deadline_s=15, what="the worker's counts in the cluster's")


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
