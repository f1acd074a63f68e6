"""A real server with two workers and a scheduler: kinds of prompt part, and nobody waits for a lost scheduler."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import psutil
import pytest
from live_server import LiveServer, poll, processes_of, running_server

from cluster.loadgen.prompts import BUNDLED_PROMPTS

pytestmark = pytest.mark.ray

# Half the experts fit, and one takes 4 ms to come: where they are is what counts.
CONFIG = """
model: {dtype: float32}
attention: {workers: 2}
experts: {cache: "50%", ram_tier: "100%", link_gb_per_s: 0.05, prediction: none}
scheduler: {report_interval_s: 0.5, prompt_clusters: 2}
"""
CODE, PROSE = BUNDLED_PROMPTS[:8], BUNDLED_PROMPTS[8:16]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveServer]:
    config = tmp_path_factory.mktemp("pair") / "config.yaml"
    config.write_text(CONFIG)
    with running_server("--config", str(config)) as live:
        poll(lambda: len(_ready(live)) == 2, deadline_s=90, what="two ready workers")
        yield live


def _ready(server: LiveServer) -> list[dict[str, Any]]:
    return [worker for worker in server.get("/status")["workers"] if worker["phase"] == "ready"]


def _ask(server: LiveServer, prompt: str, max_tokens: int = 16) -> int:
    body = {"model": "moesaic-demo", "prompt": prompt, "max_tokens": max_tokens, "temperature": 0, "ignore_eos": True}
    return httpx.post(f"{server.url}/v1/completions", json=body, timeout=120).status_code


def _ask_all(server: LiveServer, prompts: Sequence[str]) -> set[int]:
    with ThreadPoolExecutor(4) as pool:
        return set(pool.map(lambda prompt: _ask(server, prompt), prompts))


def _who_takes(server: LiveServer, prompt: str) -> str:
    """The worker that answers a request which is alone."""

    def tokens() -> dict[str, int]:
        return {worker["worker_id"]: worker["generated_tokens"] for worker in server.get("/status")["workers"]}

    before = tokens()
    assert _ask(server, prompt, max_tokens=8) == 200
    (worker,) = [worker for worker, count in tokens().items() if count > before[worker]]
    return worker


def _scheduler(server: LiveServer) -> psutil.Process:
    (process,) = [p for p in processes_of(server.root) if "SchedulerActor" in " ".join(p.cmdline())]
    return process


def _knows_kinds(server: LiveServer) -> bool:
    page = server.get("/scheduler")
    return page["knowledge"] is not None and {worker["knowledge_version"] for worker in page["workers"]} == {
        page["knowledge"]["version"]
    }


def test_workers_hear_what_kinds_of_prompt_use(pair: LiveServer) -> None:
    for _ in range(3):
        assert _ask_all(pair, [prompt for kinds in zip(CODE, PROSE, strict=True) for prompt in kinds]) == {200}
    poll(lambda: _knows_kinds(pair), deadline_s=30, what="knowledge that both workers have")

    takers = {_who_takes(pair, prompt) for prompt in (*CODE, *PROSE)}
    assert takers == {worker["worker_id"] for worker in _ready(pair)}, "both are used"
    poll(
        lambda: pair.get("/scheduler")["knowledge"]["mutual_information"] > 0.02,
        deadline_s=30,
        what="clusters that tell of experts",
    )


def test_a_lost_scheduler_costs_no_request_and_the_next_one_knows_what_it_knew(pair: LiveServer) -> None:
    poll(lambda: _knows_kinds(pair), deadline_s=30, what="knowledge")
    before, victim = pair.get("/scheduler"), _scheduler(pair)
    victim.send_signal(signal.SIGSTOP)

    assert _ask_all(pair, (*CODE, *PROSE)) == {200}
    degraded = poll(
        lambda: [reason for worker in _ready(pair) for reason in worker["degraded"] if "scheduler away" in reason],
        deadline_s=60,
        what="a status that says so",
    )
    assert all("routing and placement stand still" in reason for reason in degraded)
    assert "moesaic_scheduler_up 0.0" in httpx.get(f"{pair.url}/metrics", timeout=20).text

    victim.kill()
    assert _ask_all(pair, CODE) == {200}
    poll(lambda: _is_back(pair), deadline_s=60, what=lambda: f"the scheduler; {pair.log}")

    after = pair.get("/scheduler")
    assert _scheduler(pair) != victim
    assert after["uptime_s"] < before["uptime_s"] or after["uptime_s"] < 60
    assert after["knowledge"]["version"] > before["knowledge"]["version"]
    assert after["knowledge"]["num_clusters"] == before["knowledge"]["num_clusters"]
    poll(lambda: not any(w["degraded"] for w in _ready(pair)), deadline_s=60, what="no complaint any more")


def _is_back(server: LiveServer) -> bool:
    answer = httpx.get(f"{server.url}/scheduler", timeout=20)
    return answer.status_code == 200 and answer.json()["knowledge"] is not None and len(answer.json()["workers"]) == 2
