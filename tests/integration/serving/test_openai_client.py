"""The official openai client against a real server."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import openai
import pytest

pytestmark = pytest.mark.ray

MODEL = "moesaic-demo"
PROMPTS = [
    "What is 12 + 30?",
    "Once upon a time",
    "def add(a, b):",
    "The capital of France",
    "Question: which is larger, 7 or 9?\nAnswer:",
    "SELECT name FROM",
    "Dear Sir,",
    "1, 2, 3, 4,",
]


def _complete(client: openai.OpenAI, prompt: str, max_tokens: int) -> str:
    answer = client.completions.create(model=MODEL, prompt=prompt, max_tokens=max_tokens, temperature=0)
    return answer.choices[0].text


def test_chat_streams_with_logprobs_and_usage(client: openai.OpenAI) -> None:
    stream = client.chat.completions.create(
        model=MODEL,
        messages=[{"role": "user", "content": "What is 12 + 30?"}],
        max_tokens=24,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
        logprobs=True,
        top_logprobs=3,
        extra_body={"ignore_eos": True},
    )
    chunks = list(stream)

    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 24
    assert chunks[-1].usage.total_tokens == chunks[-1].usage.prompt_tokens + 24
    choices = [choice for chunk in chunks for choice in chunk.choices]
    assert "".join(choice.delta.content or "" for choice in choices)
    assert [choice.finish_reason for choice in choices if choice.finish_reason] == ["length"]
    entries = [entry for choice in choices if choice.logprobs for entry in choice.logprobs.content or ()]
    assert len(entries) == 24
    for entry in entries:
        assert entry.logprob <= 0
        assert len(entry.top_logprobs) == 3
        assert entry.top_logprobs[0].logprob == pytest.approx(entry.logprob), "greedy takes the likeliest"


def test_completion_in_one_piece(client: openai.OpenAI) -> None:
    answer = client.completions.create(model=MODEL, prompt="Once upon a time", max_tokens=8, temperature=0, logprobs=2)

    assert answer.choices[0].text
    assert answer.choices[0].finish_reason in ("length", "stop")
    assert answer.usage is not None and 1 <= answer.usage.completion_tokens <= 8
    assert answer.choices[0].logprobs is not None
    assert len(answer.choices[0].logprobs.token_logprobs or ()) == answer.usage.completion_tokens


def test_models_are_listed_and_retrieved(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list().data] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "moesaic"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("nosuch")


def test_stop_string_ends_the_text_before_it(client: openai.OpenAI) -> None:
    whole = _complete(client, "Once upon a time", 48)
    stop = whole[20:25]

    answer = client.completions.create(
        model=MODEL, prompt="Once upon a time", max_tokens=48, temperature=0, stop=[stop]
    )

    assert answer.choices[0].text == whole[: whole.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


def test_same_seed_gives_the_same_text(client: openai.OpenAI) -> None:
    def sample(seed: int) -> str:
        answer = client.completions.create(
            model=MODEL, prompt="Once upon a time", max_tokens=32, temperature=1.0, seed=seed
        )
        return answer.choices[0].text

    assert sample(7) == sample(7)
    assert len({sample(seed) for seed in range(4)}) > 1


def test_sixteen_at_once_answer_as_one_by_one(client: openai.OpenAI) -> None:
    requests = [(f"{prompt} " * (1 + n), 16 + n) for n, prompt in enumerate(PROMPTS * 2)]
    alone = [_complete(client, *request) for request in requests]

    with ThreadPoolExecutor(len(requests)) as pool:
        together = list(pool.map(lambda request: _complete(client, *request), requests))

    assert together == alone
