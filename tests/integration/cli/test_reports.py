"""`status`, `bench serve` and `convert widen`: tables, JSON and exit codes."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import Result

from actors.convert.widen import WidenReport
from cluster.cli.status import memory_rows, residency_line

Run = Callable[..., Result]


def test_status_table(run: Run, server: Any) -> None:
    result = run("status", "--url", server.url, "--api-key", "k")
    assert result.exit_code == 0, result.output
    for part in ("w0", "ready", "2 / 1", "7 of 100", "0.5 MiB of 1.0 MiB", "90 / 10", "direct", "native"):
        assert part in result.stdout
    assert "degraded (w0): statistics not shared" in result.stdout
    assert "layer   0" in result.stdout
    assert "degraded (cluster" not in result.stdout
    rows = [line.split() for line in result.stdout.splitlines()]
    cells = {tuple(row[1:3]): row[4:] for row in rows if row[1:2] in (["prefill"], ["decode"])}
    assert cells["prefill", "activations"][::2] == ["3,000", "8"], "the cluster's and the worker's own"
    assert cells["decode", "activations"][::2] == ["8", "0"]
    assert "8.00 (layer 0)" in result.stdout and "1.00 (layer 0)" in result.stdout
    assert all(headers["Authorization"] == "Bearer k" for headers in server.headers)


def test_status_shows_tiers_prefetch_and_forecasts(run: Run, server: Any) -> None:
    rows = memory_rows(server.pages["/status"]["workers"][0]["expert_memory"])
    assert rows["eviction / prediction"] == "moesaic / fmoe"
    assert rows["device tier"] == "0.5 MiB of 1.0 MiB, 90% found here"
    assert rows["ram tier"] == "2.0 MiB of 4.0 MiB, 7% found here, moved 3.0 MiB (emulated link)"
    assert rows["disk tier"] == "3% found here"
    assert rows["prefetch"] == "21 used, 2 late, 4 wasted, 1 dropped; 1.5 MiB; search 3.4% of step time"
    assert rows["forecast: came true"] == "12%: 9%, 80%: 75%"

    memory = server.pages["/status"]["workers"][0]["expert_memory"]
    loading = {**server.pages["/status"]["workers"][0], "worker_id": "w1", "expert_memory": None}
    host = {"host_id": "h7", "phase": "ready", "owned": 64, "epoch": 3, "num_frames": 5, "num_rows": 50}
    server.pages["/status"] |= {"workers": [loading], "hosts": [{**host, "expert_memory": memory}]}
    table = run("status", "--url", server.url).stdout
    for part in ("h7", "64 (epoch 3)", "found here", "21 used", "12%: 9%"):
        assert part in table, "a host's; the worker has none yet"


def test_status_says_when_cluster_wide_counts_are_old(run: Run, server: Any) -> None:
    server.pages["/experts"]["cluster"]["degraded"] = "redis://h:1 is away"
    assert "degraded (cluster-wide counts): redis://h:1 is away" in run("status", "--url", server.url).stdout


def test_status_json(run: Run, server: Any) -> None:
    state = json.loads(run("status", "--url", server.url, "--json").stdout)
    assert state["workers"][0]["worker_id"] == "w0"
    assert state["experts"][0]["layers"][0]["resident"] == [0, 1, 2, 3]
    assert state["cluster"]["layers"][0]["activations"]["prefill"][0] == 3000
    assert state["ready"] == {"status": "ready"}


def test_status_without_workers(run: Run, server: Any) -> None:
    server.pages["/status"] = {"workers": [], "draining": True}
    server.pages["/experts"] = {"workers": []}
    result = run("status", "--url", server.url)
    assert "no workers yet" in result.stdout
    assert "draining" in result.stdout


def test_residency_line_of_many_experts() -> None:
    layer = {"layer": 7, "num_experts": 128, "resident": [0, 1, 2, 3, 4], "activations": {}, "hits": 0, "misses": 0}
    assert residency_line(layer) == "layer   7 █░" + "·" * 30 + "    5/128 not used"


def test_bench_json_and_table(run: Run, server: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace.csv"
    trace.write_text("arrival_s,input_tokens,output_tokens\n0,6,2\n0.01,12,3\n")
    flags = ["bench", "serve", "--url", server.url, "--slo-ttft-ms", "5000", "--json"]
    report = json.loads(run(*flags, "--trace", str(trace), "--tokenizer", "moesaic-demo").stdout)
    assert report["model"] == "demo"
    assert report["num_completed"] == 2
    assert report["output_tokens"] == 4
    assert report["goodput"]["fraction"] == 1.0
    assert sorted(body["max_tokens"] for body in server.bodies) == [2, 3]
    assert all(body["ignore_eos"] and body["stream"] for body in server.bodies)

    result = run("bench", "serve", "--url", server.url, "--concurrency", "2", "--num-requests", "4")
    assert result.exit_code == 0, result.output
    for part in ("TTFT", "TPOT", "ITL", "E2E", "p99", "4 of 4 requests"):
        assert part in result.stdout


def test_bench_of_a_failing_server_exits_1(run: Run, server: Any) -> None:
    server.error = (503, "draining")
    result = run("bench", "serve", "--url", server.url, "--num-requests", "2", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["failures"] == {"503": 2}


def test_convert_widen(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def widen_checkpoint(
        src: Path, dst: Path, *, on_progress: Callable[[int, int], None], **options: int
    ) -> WidenReport:
        assert (src.name, options) == ("moesaic-demo", {"factor": 2, "seed": 7})
        on_progress(1, 2)
        return WidenReport(
            path=dst, factor=2, num_experts=384, expert_bytes=2**21, total_bytes=2**22, num_shards=1, max_residual=0.0
        )

    monkeypatch.setattr("actors.convert.widen.widen_checkpoint", widen_checkpoint)
    arguments = ["convert", "widen", "moesaic-demo", str(tmp_path / "wide"), "--factor", "2", "--seed", "7"]
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["num_experts"] == 384
    assert "384 experts, 2.0 MiB of them (4.0 MiB in all), 1 file(s)" in run(*arguments).stdout
