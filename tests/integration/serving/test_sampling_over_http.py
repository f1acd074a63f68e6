"""Several choices, penalties, scoring and aborting against a real server."""

from __future__ import annotations

import threading
from typing import Any

import httpx
import openai
import pytest
from live_server import LiveServer, poll

pytestmark = pytest.mark.ray

MODEL = "moesaic-demo"
PROMPT = "Once upon a time there was a king, and the king had a daughter who"


def test_choices_differ_share_the_prompt_and_come_back_with_the_seed(client: openai.OpenAI) -> None:
    def ask() -> Any:
        return client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, n=3, seed=11, temperature=1.0)

    first, again = ask(), ask()

    assert len({choice.text for choice in first.choices}) > 1
    assert [choice.text for choice in first.choices] == [choice.text for choice in again.choices]
    alone = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=16, seed=11, temperature=1.0)
    assert alone.choices[0].text == first.choices[0].text
    assert first.usage.prompt_tokens == alone.usage.prompt_tokens
    assert again.usage.prompt_tokens_details.cached_tokens > 0


def test_streamed_choices_are_those_of_the_whole_answer(client: openai.OpenAI) -> None:
    body: dict[str, Any] = {"model": MODEL, "messages": [{"role": "user", "content": "Tell me a story."}], "n": 2}
    body |= {"max_tokens": 12, "seed": 3, "frequency_penalty": 1.0, "extra_body": {"repetition_penalty": 1.2}}
    whole = client.chat.completions.create(**body)

    texts = ["", ""]
    for chunk in client.chat.completions.create(stream=True, **body):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""

    assert texts == [choice.message.content for choice in whole.choices]


def test_a_repetition_penalty_leaves_fewer_repeated_tokens(client: openai.OpenAI) -> None:
    def num_distinct(penalty: float) -> int:
        extra = {"repetition_penalty": penalty, "ignore_eos": True}
        answer = client.completions.create(
            model=MODEL, prompt=PROMPT, max_tokens=48, temperature=0, logprobs=0, extra_body=extra
        )
        return len(set(answer.choices[0].logprobs.tokens))

    assert num_distinct(1.5) > num_distinct(1.0)


def test_scoring_a_text_is_what_generating_it_said(client: openai.OpenAI) -> None:
    said = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=8, temperature=0, logprobs=0)
    text = PROMPT + said.choices[0].text

    scored = client.completions.create(model=MODEL, prompt=text, max_tokens=1, echo=True, logprobs=0, temperature=0)

    values = scored.choices[0].logprobs.token_logprobs
    assert values[0] is None
    assert len(values) == scored.usage.prompt_tokens + 1
    assert values[-9:-1] == pytest.approx(said.choices[0].logprobs.token_logprobs, abs=1e-3)


def test_more_choices_than_run_together_wait_their_turn(client: openai.OpenAI) -> None:
    assert client.completions.create(model=MODEL, prompt="a", n=64, max_tokens=1).usage.completion_tokens == 64


def test_an_answer_is_aborted_by_the_id_its_client_chose(server: LiveServer) -> None:
    body = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1500, "ignore_eos": True, "temperature": 0}
    answers: list[httpx.Response] = []

    def ask() -> None:
        headers = {"x-request-id": "to be stopped".replace(" ", "-")}
        answers.append(httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60))

    asking = threading.Thread(target=ask)
    asking.start()

    def aborted() -> bool:
        answer = httpx.post(f"{server.url}/abort_requests", json={"request_ids": ["to-be-stopped"]}, timeout=10)
        return answer.json()["aborted"] == ["to-be-stopped"]

    poll(aborted, deadline_s=60, what="the request to be found")
    asking.join(timeout=20)
    assert answers[0].json()["choices"][0]["finish_reason"] == "abort"
    assert answers[0].json()["usage"]["completion_tokens"] < 1500
    poll(lambda: server.get("/status")["workers"][0]["num_running"] == 0, deadline_s=30, what="the engine to be idle")


def test_tokenize_counts_what_usage_counts(client: openai.OpenAI, server: LiveServer) -> None:
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    counted = httpx.post(f"{server.url}/tokenize", json={"messages": messages}, timeout=10).json()
    answer = client.chat.completions.create(model=MODEL, messages=messages, max_tokens=1)

    assert counted["count"] == answer.usage.prompt_tokens
    text = httpx.post(f"{server.url}/detokenize", json={"tokens": counted["tokens"]}, timeout=10).json()["prompt"]
    assert "What is 12 + 30?" in text
