"""`generate` and `chat`, with a server and with an engine in this process."""

from __future__ import annotations

import json
import sys
import types
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

import pytest
from typer.testing import Result

from cluster.types import FinishReason

Run = Callable[..., Result]


def test_generate_streams_from_a_server(run: Run, server: Any) -> None:
    result = run("generate", "--url", server.url, "--prompt", "p", "--temperature", "0", "--stop", "a", "--stop", "b")
    assert result.exit_code == 0, result.output
    assert result.stdout == "one two\n"
    assert server.bodies == [
        {"model": "demo", "stream": True, "prompt": "p", "max_tokens": 128, "temperature": 0.0, "stop": ["a", "b"]}
    ]


def test_penalties_are_sent_to_a_server(run: Run, server: Any) -> None:
    flags = ("--min-p", "0.1", "--presence-penalty", "0.5", "--frequency-penalty", "-1", "--repetition-penalty", "1.2")
    assert run("generate", "--url", server.url, "--prompt", "p", *flags).exit_code == 0
    expected = {"min_p": 0.1, "presence_penalty": 0.5, "frequency_penalty": -1.0, "repetition_penalty": 1.2}
    assert expected.items() <= server.bodies[0].items()


def test_generate_json_and_stdin(run: Run, server: Any) -> None:
    result = run("generate", "--url", server.url, "--prompt", "-", "--json", stdin="from stdin")
    answer = json.loads(result.stdout)
    assert answer == {"model": "demo", "prompt": "from stdin", "text": "one two", "finish_reason": "length"}


@pytest.mark.parametrize(("code", "exit_code"), [(400, 2), (401, 2), (404, 2), (429, 1), (503, 1), (500, 1)])
def test_answers_that_are_errors(run: Run, server: Any, code: int, exit_code: int) -> None:
    server.error = (code, "what is\nwrong")
    result = run("generate", "--url", server.url, "--prompt", "p")
    assert result.exit_code == exit_code
    assert result.stderr == "error: what is wrong\n"


def test_chat_keeps_and_forgets_history(run: Run, server: Any) -> None:
    result = run("chat", "--url", server.url, "--system", "s", stdin="hi\n\nmore\n/what\n/reset\nnew\n/exit\nnever\n")
    assert result.exit_code == 0, result.output
    said = [[(m["role"], m["content"]) for m in body["messages"]] for body in server.bodies]
    opening = ("system", "s")
    assert said == [
        [opening, ("user", "hi")],
        [opening, ("user", "hi"), ("assistant", "one two"), ("user", "more")],
        [opening, ("user", "new")],
    ]


def test_chat_goes_on_after_an_error_and_ends_with_the_input(run: Run, server: Any) -> None:
    server.error = (429, "queue full")
    result = run("chat", "--url", server.url, stdin="hi\nagain\n")
    assert result.exit_code == 0
    assert result.stderr.count("error: queue full") == 2
    assert [len(body["messages"]) for body in server.bodies] == [1, 1]


class _FakeService:
    """As much of `GenerationService` as the commands use; interrupts itself after `interrupt_after` chunks."""

    def __init__(self, interrupt_after: int | None = None) -> None:
        self.seen: list[tuple[object, Any]] = []
        self.closed = 0
        self._interrupt_after = interrupt_after

    async def encode_chat(self, messages: Sequence[dict[str, str]]) -> tuple[int, ...]:
        return tuple(len(message["content"]) for message in messages)

    async def generate(self, prompt: object, options: Any, request_id: str) -> AsyncIterator[Any]:
        self.seen.append((prompt, options))
        try:
            for number, text in enumerate(("uno", " due")):
                if number == self._interrupt_after:
                    raise KeyboardInterrupt
                yield types.SimpleNamespace(text=text, finish_reason=FinishReason.STOP if number else None)
        finally:
            self.closed += 1


def _install_engine(monkeypatch: pytest.MonkeyPatch, service: _FakeService) -> list[Any]:
    configs: list[Any] = []

    def local_service(config: Any) -> _FakeService:
        configs.append(config)
        return service

    module = types.ModuleType("cluster.app")
    module.local_service = local_service  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "cluster.app", module)
    return configs


def test_generate_in_this_process(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    service = _FakeService()
    configs = _install_engine(monkeypatch, service)
    flags = ["--seed", "4", "--expert-cache", "25%", "--eviction", "lru", "--prediction", "none"]
    result = run("generate", "moesaic-demo", "--prompt", "p", *flags, "--json")
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["text"] == "uno due"
    assert json.loads(result.stdout)["finish_reason"] == "stop"
    experts = configs[0].experts
    assert (experts.cache, experts.eviction, experts.prediction) == ("25%", "lru", "none")
    prompt, options = service.seen[0]
    assert (prompt, options.seed, options.max_tokens, options.temperature) == ("p", 4, 128, None)


def test_interrupted_answer_stays_in_the_chat(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    service = _FakeService(interrupt_after=1)
    configs = _install_engine(monkeypatch, service)
    result = run("chat", "--ram-tier", "50%", stdin="hi\nhello\n")
    assert result.exit_code == 0, result.output
    assert configs[0].experts.ram_tier == "50%"
    assert "(stopped)" in result.stdout
    assert [prompt for prompt, _ in service.seen] == [(2,), (2, 3, 5)]
    assert service.closed == 2
