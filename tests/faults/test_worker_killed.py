"""Attention workers die, or stand still, in the middle of answers: clients do not notice."""

from __future__ import annotations

import threading
from collections.abc import Iterator

import httpx
import psutil
import pytest
from live_server import LiveServer, poll, processes_of, running_server

pytestmark = pytest.mark.ray

PROMPTS = ("Once upon a time", "def read_lines(path):", "Question: What is 12 + 30?\nAnswer:", "It was a dark night")
NUM_TOKENS = 400
TIMEOUT_S = 60.0


class Answer:
    """One streamed answer, read in a thread of its own."""

    def __init__(self, server: LiveServer, prompt: str, number: int) -> None:
        self.token_ids: list[int] = []
        self.error: str | None = None
        self.is_whole = False
        sampling = {"temperature": 0} if number % 2 else {"temperature": 1.0, "seed": 7}
        self._body = {
            "model": "moesaic-demo",
            "prompt": prompt,
            "max_tokens": NUM_TOKENS,
            "stream": True,
            "return_token_ids": True,
            "ignore_eos": True,
            **sampling,
        }
        self._url = f"{server.url}/v1/completions"
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def wait(self) -> list[int]:
        """All its tokens; fails when it ended otherwise."""
        self._thread.join(TIMEOUT_S)
        assert self.is_whole, f"after {len(self.token_ids)} tokens: {self.error or 'nothing more'}"
        return self.token_ids

    def _read(self) -> None:
        from cluster.loadgen.sse import event_error_message

        try:
            with httpx.stream("POST", self._url, json=self._body, timeout=TIMEOUT_S) as response:
                for event in _events(response):
                    self.error = self.error or event_error_message(event)
                    for choice in event.get("choices", ()):
                        self.token_ids += choice.get("token_ids") or ()
                self.is_whole = response.status_code == 200 and self.error is None
        except httpx.HTTPError as error:
            self.error = repr(error)


def _events(response: httpx.Response) -> Iterator[dict[str, object]]:
    import json

    for line in response.iter_lines():
        if line.startswith("data: {"):
            yield json.loads(line.removeprefix("data: "))


def _worker_processes(server: LiveServer) -> set[psutil.Process]:
    return {
        process
        for process in processes_of(server.root)
        if (command := " ".join(process.cmdline())) and "ServeReplica" in command and "AttentionWorker" in command
    }


def _workers_are_ready(server: LiveServer) -> bool:
    workers = server.get("/status")["workers"]
    return len(workers) == 2 and all(worker["phase"] == "ready" for worker in workers)


def _begin(server: LiveServer) -> list[Answer]:
    """An answer to each prompt, spread over both workers and well under way: front ends hear of a new worker soon."""
    return poll(lambda: _spread(server), deadline_s=60, what="answers of both workers")


def _spread(server: LiveServer) -> list[Answer] | None:
    """None, once they are over, if one worker has nothing to lose."""
    answers = [Answer(server, prompt, number) for number, prompt in enumerate(PROMPTS)]
    poll(lambda: min(len(answer.token_ids) for answer in answers) >= 5, deadline_s=30, what="tokens of every answer")
    if all(worker["num_running"] for worker in server.get("/status")["workers"]):
        return answers
    for answer in answers:
        answer.wait()
    return None


def test_workers_that_die_or_stand_still_are_not_noticed() -> None:
    two_workers = {"MOESAIC__ATTENTION__WORKERS": "2", "MOESAIC__MODEL__DTYPE": "float32"}
    with running_server("--threads", "1", **two_workers) as server:
        poll(lambda: _workers_are_ready(server), deadline_s=60, what=lambda: f"two workers; log:\n{server.log}")
        expected = [answer.wait() for answer in _begin(server)]
        assert [len(token_ids) for token_ids in expected] == [NUM_TOKENS] * len(PROMPTS)

        answers = _begin(server)
        victim = min(_worker_processes(server), key=lambda process: process.pid)
        victim.kill()
        assert [answer.wait() for answer in answers] == expected

        poll(lambda: _workers_are_ready(server), deadline_s=90, what=lambda: f"two workers again; log:\n{server.log}")
        assert victim not in _worker_processes(server)

        answers = _begin(server)
        victim = min(_worker_processes(server), key=lambda process: process.pid)
        victim.suspend()
        try:
            assert [answer.wait() for answer in answers] == expected
        finally:
            victim.resume()
        poll(
            lambda: (s := server.get("/status")) and all(worker["num_running"] == 0 for worker in s["workers"]),
            deadline_s=60,
            what="the worker that was given up drops its sequences",
        )
