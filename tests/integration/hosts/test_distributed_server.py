"""A real `moesaic serve` with two attention workers and two hosts: the answers of one process, and real kills."""

from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import openai
import psutil
import pytest
import torch
from identity import Case, Reference, assert_identical
from live_server import LiveServer, poll, processes_of, running_server
from model_builders import DEMO

from cluster.frontend.generation.tokenizer import Tokenizer
from cluster.loadgen.prompts import BUNDLED_PROMPTS

pytestmark = pytest.mark.ray

NUM_REQUESTS = 16


@pytest.fixture(scope="module")
def distributed() -> Iterator[LiveServer]:
    with running_server("--dtype", "float32", "--attention-workers", "2", "--expert-hosts", "2") as live:
        yield live


@pytest.fixture(scope="module")
def cases() -> list[Case]:
    tokenizer = Tokenizer.load(DEMO)
    texts = [BUNDLED_PROMPTS[i % len(BUNDLED_PROMPTS)] for i in range(NUM_REQUESTS)]
    return [Case(str(i), tuple(tokenizer.encode(text))[: 8 + 7 * i], 32) for i, text in enumerate(texts)]


@pytest.fixture(scope="module")
def reference() -> Iterator[Reference]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # the server's processes want the cores, too
    yield Reference(DEMO)
    torch.set_num_threads(before)


def _answers(server: LiveServer, cases: list[Case]) -> list[list[int]]:
    """Greedy answers to all cases at once."""
    with (
        openai.OpenAI(base_url=f"{server.url}/v1", api_key="any", max_retries=0, timeout=120) as client,
        ThreadPoolExecutor(len(cases)) as pool,
    ):

        def ask(case: Case) -> list[int]:
            answer = client.completions.create(
                model="moesaic-demo",
                prompt=list(case.prompt_ids),
                max_tokens=case.max_tokens,
                temperature=0,
                extra_body={"return_token_ids": True},
            )
            return answer.choices[0].model_extra["token_ids"]  # type: ignore[index]

        return list(pool.map(ask, cases))


def _generated(server: LiveServer) -> dict[str, int]:
    return {worker["worker_id"]: worker["generated_tokens"] for worker in server.get("/status")["workers"]}


def _host_processes(server: LiveServer) -> list[psutil.Process]:
    return [p for p in processes_of(server.root) if "ExpertHostActor" in " ".join(p.cmdline())]


def test_two_workers_and_two_hosts_answer_16_requests_as_transformers(
    distributed: LiveServer, cases: list[Case], reference: Reference
) -> None:
    def num_ready() -> int:
        return sum(worker["phase"] == "ready" for worker in distributed.get("/status")["workers"])

    def both_had_requests() -> bool:
        _answers(distributed, cases[:4])
        return all(worker["generated_tokens"] for worker in distributed.get("/status")["workers"])

    poll(lambda: num_ready() == 2, deadline_s=60, what="two ready workers")  # a server is ready with its first one
    poll(both_had_requests, deadline_s=30, what="answers of the second worker, too")  # front ends hear of it soon
    before = _generated(distributed)
    answers = _answers(distributed, cases)

    status = distributed.get("/status")
    assert len(status["workers"]) == 2
    assert all(_generated(distributed)[worker] > before[worker] for worker in before), "both must have had requests"
    assert [worker["data_plane"]["carriers"] for worker in status["workers"]] == [["shared memory"] * 2] * 2
    assert [host["num_connections"] for host in status["hosts"]] == [2, 2]
    assert all(host["num_frames"] > 0 for host in status["hosts"])
    assert_identical(reference, cases, answers)


def test_experts_page_shows_hosts_and_counts_of_the_whole_cluster(distributed: LiveServer, cases: list[Case]) -> None:
    _answers(distributed, cases[:4])

    page = distributed.get("/experts")

    assert [len(host["layers"]) for host in page["hosts"]] == [12, 12]
    assert all(any(layer["resident"] for layer in host["layers"]) for host in page["hosts"])
    poll(
        lambda: _cluster_total(distributed) == _workers_total(distributed) > 0,
        deadline_s=30,
        what="the workers' counts in the shared store",
    )


def test_killed_host_costs_no_request_and_comes_back(
    distributed: LiveServer, cases: list[Case], reference: Reference
) -> None:
    victim = _host_processes(distributed)[0]
    before = set(Path("/dev/shm").iterdir())
    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(_answers, distributed, cases)
        started = sum(worker["generated_tokens"] for worker in distributed.get("/status")["workers"])
        poll(
            lambda: sum(w["generated_tokens"] for w in distributed.get("/status")["workers"]) > started + 32,
            deadline_s=60,
            what="tokens under way",
        )
        victim.kill()
        assert_identical(reference, cases, answers.result(timeout=120))

    assert any(worker["data_plane"]["hosts_lost"] for worker in distributed.get("/status")["workers"])
    poll(lambda: _is_whole(distributed), deadline_s=90, what=lambda: f"the host's return; {distributed.log}", every_s=1)
    assert victim not in _host_processes(distributed)
    assert set(Path("/dev/shm").iterdir()) <= before
    began = time.monotonic()
    assert_identical(reference, cases[:4], _answers(distributed, cases[:4]))
    assert time.monotonic() - began < 60


def _is_whole(server: LiveServer) -> bool:
    status = server.get("/status")
    return all(host["phase"] == "ready" for host in status["hosts"]) and not any(
        worker["degraded"] for worker in status["workers"]
    )


def _cluster_total(server: LiveServer) -> int:
    layers = server.get("/experts")["cluster"]["layers"]
    return sum(sum(counts) for layer in layers for counts in layer["activations"].values())


def _workers_total(server: LiveServer) -> int:
    workers = server.get("/experts")["workers"]
    return sum(sum(c) for worker in workers for layer in worker["layers"] for c in layer["activations"].values())
