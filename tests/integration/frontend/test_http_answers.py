"""Answers and streams of the HTTP application over a scripted worker."""

from __future__ import annotations

import asyncio
import json

import httpx
import openai
import pytest
from fakes import FakeAttentionWorker

from cluster.frontend.generation.sequence import SamplingOptions
from cluster.types import FinishReason

CHAT = {"model": "moesaic-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
STREAM = CHAT | {"stream": True}
PATH = "/v1/chat/completions"


def client_of(app, **options):
    http_client = httpx.AsyncClient(transport=httpx.ASGITransport(app))
    return openai.AsyncOpenAI(api_key="x", base_url="http://test/v1", http_client=http_client, max_retries=0, **options)


def events_of(text):
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


def test_openai_client_streams_a_chat(make_app, tokenizer):
    script = tokenizer.encode(" Hello, naïve world!")
    worker = FakeAttentionWorker(script, chunk_size=2, num_cached_tokens=1)

    async def scenario():
        stream = await client_of(make_app(worker)).chat.completions.create(
            model="moesaic-demo",
            messages=[
                {"role": "developer", "content": "x"},
                {"role": "user", "content": [{"type": "text", "text": "y"}]},
            ],
            max_completion_tokens=len(script),
            stream=True,
            stream_options={"include_usage": True},
            logprobs=True,
            top_logprobs=2,
        )
        return [chunk async for chunk in stream]

    *chunks, usage = asyncio.run(scenario())
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(chunk.choices[0].delta.content or "" for chunk in chunks) == " Hello, naïve world!"
    assert [chunk.choices[0].finish_reason for chunk in chunks][-2:] == [None, "length"]
    assert {chunk.object for chunk in chunks} == {"chat.completion.chunk"}
    assert len({chunk.id for chunk in chunks}) == 1
    tokens = [entry for chunk in chunks if (lp := chunk.choices[0].logprobs) for entry in lp.content]
    assert b"".join(bytes(entry.bytes) for entry in tokens).decode() == " Hello, naïve world!"
    assert [len(entry.top_logprobs) for entry in tokens] == [2] * len(script)
    assert usage.choices == []
    assert usage.usage.completion_tokens == len(script)
    assert usage.usage.prompt_tokens == len(worker.requests[0].prompt_ids)
    assert usage.usage.prompt_tokens_details.cached_tokens == 1
    assert worker.aborted == []


def test_openai_client_without_streaming(make_app, tokenizer):
    script = tokenizer.encode("one two")
    worker = FakeAttentionWorker([*script, 2], end_token=2)

    async def scenario():
        client = client_of(make_app(worker))
        chat = await client.chat.completions.create(
            model="moesaic-demo", messages=[{"role": "user", "content": "hi"}], logprobs=True, seed=-5
        )
        again = [{"role": "user", "content": "hi"}, chat.choices[0].message]
        await client.chat.completions.create(model="moesaic-demo", messages=again, n=1, tools=[], user="me")
        return chat, await client.models.list(), await client.models.retrieve("moesaic-demo")

    chat, models, model = asyncio.run(scenario())
    assert chat.choices[0].message.content == "one two"
    assert chat.choices[0].finish_reason == "stop"
    assert chat.usage.completion_tokens == len(script) + 1
    assert len(chat.choices[0].logprobs.content) == len(script) + 1
    assert models.data[0].id == model.id == "moesaic-demo"
    first, second = worker.requests
    assert first.sampling.max_tokens == 2048 - len(first.prompt_ids)
    assert first.sampling.seed == -5 % 2**63
    assert second.sampling.seed != first.sampling.seed


@pytest.mark.parametrize("stream", [False, True])
def test_completions_of_several_prompts(make_app, tokenizer, stream):
    script = tokenizer.encode(" a b c d")
    worker = FakeAttentionWorker(script)

    async def scenario():
        create = client_of(make_app(worker)).completions.create
        answer = await create(
            model="moesaic-demo", prompt=["x", "yy"], max_tokens=len(script), logprobs=1, stream=stream
        )
        if not stream:
            return {choice.index: (choice.text, [choice.logprobs]) for choice in answer.choices}
        texts = {0: ("", []), 1: ("", [])}
        async for chunk in answer:
            for choice in chunk.choices:
                text, logprobs = texts[choice.index]
                texts[choice.index] = (text + choice.text, [*logprobs, choice.logprobs])
        return texts

    for text, logprobs in asyncio.run(scenario()).values():
        assert text == " a b c d"
        offsets = [offset for entry in logprobs if entry for offset in entry.text_offset]
        tokens = [token for entry in logprobs if entry for token in entry.tokens]
        assert "".join(tokens) == text
        assert offsets == [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    assert len({request.request_id for request in worker.requests}) == 2
    assert [request.choice for request in sorted(worker.requests, key=lambda r: r.request_id)] == [0, 1]


def test_completions_defaults_echo_and_token_ids(make_app, call, tokenizer):
    worker = FakeAttentionWorker(tokenizer.encode("z"))

    async def scenario():
        body = {"model": "moesaic-demo", "prompt": tokenizer.encode("abc"), "echo": True}
        return await call(make_app(worker), "POST", "/v1/completions", json=body)

    choice = asyncio.run(scenario()).json()["choices"][0]
    assert choice["text"] == "abc" + "z" * 16
    assert worker.requests[0].prompt_ids == tuple(tokenizer.encode("abc"))


@pytest.mark.parametrize("chunk_size", [1, 3, 50])
def test_stop_string_ends_and_aborts(make_app, call, tokenizer, chunk_size):
    worker = FakeAttentionWorker(tokenizer.encode("alpha beta STOP gamma delta"), chunk_size=chunk_size)

    async def scenario():
        return await call(make_app(worker), "POST", PATH, json=CHAT | {"max_tokens": 100, "stop": [" STOP", "xyz"]})

    answer = asyncio.run(scenario()).json()
    assert answer["choices"][0]["message"]["content"] == "alpha beta"
    assert answer["choices"][0]["finish_reason"] == "stop"
    assert answer["usage"]["completion_tokens"] == len(tokenizer.encode("alpha beta STOP"))
    assert worker.aborted == [worker.requests[0].request_id]
    assert worker.closed == worker.aborted


def test_sse_framing(make_app, call):
    async def scenario():
        return await call(make_app(), "POST", PATH, json=STREAM)

    response = asyncio.run(scenario())
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.text.endswith("data: [DONE]\n\n")
    assert all(block.startswith("data: ") for block in response.text.removesuffix("\n\n").split("\n\n"))
    assert "usage" not in events_of(response.text)[0]


def test_service_generates_from_text(make_service, tokenizer):
    worker = FakeAttentionWorker(tokenizer.encode(" ok"))

    async def scenario():
        stream = make_service(worker).generate("Hello", SamplingOptions(max_tokens=1), "r1")
        return [chunk async for chunk in stream]

    chunks = asyncio.run(scenario())
    assert chunks[-1].finish_reason is FinishReason.LENGTH
    assert chunks[-1].usage.completion_tokens == 1


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs_begins_with_those_of_the_prompt(make_app, tokenizer, stream):
    """The way evaluation harnesses score a given text."""
    worker = FakeAttentionWorker(tokenizer.encode("z"))
    prompt = tokenizer.encode("one two three")

    async def scenario():
        create = client_of(make_app(worker)).completions.create
        answer = await create(model="moesaic-demo", prompt=prompt, max_tokens=2, echo=True, logprobs=1, stream=stream)
        if not stream:
            return [answer.choices[0]]
        return [choice async for chunk in answer for choice in chunk.choices]

    choices = asyncio.run(scenario())
    text = "".join(choice.text for choice in choices)
    parts = [choice.logprobs for choice in choices if choice.logprobs]
    tokens = [token for part in parts for token in part.tokens]
    values = [value for part in parts for value in part.token_logprobs]
    tops = [top for part in parts for top in part.top_logprobs]
    assert text == "".join(tokens) == "one two threezz"
    assert values == [None, *(-float(token) for token in prompt[1:]), -0.5, -0.5]
    assert tops[0] is None
    assert tops[1].keys() == {tokens[1], tokenizer.decode([7])}
    offsets = [offset for part in parts for offset in part.text_offset]
    assert offsets == [sum(map(len, tokens[:n])) for n in range(len(tokens))]
    assert worker.requests[0].sampling.num_prompt_logprobs == 1


@pytest.mark.parametrize("path", [PATH, "/v1/completions"])
def test_prompt_logprobs_have_vllms_shape(make_app, call, path):
    worker = FakeAttentionWorker()
    body = CHAT if path == PATH else {"model": "moesaic-demo", "prompt": "one two", "max_tokens": 1}

    async def scenario():
        return await call(make_app(worker), "POST", path, json=body | {"prompt_logprobs": 1})

    answer = asyncio.run(scenario()).json()
    scored = (answer if path == PATH else answer["choices"][0])["prompt_logprobs"]
    ids = worker.requests[0].prompt_ids
    assert scored[0] is None
    assert [place[str(token)]["logprob"] for place, token in zip(scored[1:], ids[1:], strict=True)] == [
        -float(token) for token in ids[1:]
    ]
    assert scored[1][str(ids[1])]["rank"] == 2
    assert scored[1]["7"] == {"logprob": -0.25, "rank": 1, "decoded_token": "%"}
    assert answer["choices"][0].get("logprobs") is None


def test_streamed_token_ids(make_app, call, tokenizer):
    worker = FakeAttentionWorker(tokenizer.encode("z"))

    async def scenario():
        return await call(make_app(worker), "POST", PATH, json=STREAM | {"return_token_ids": True})

    first, *rest = events_of(asyncio.run(scenario()).text)
    assert first["prompt_token_ids"] == list(worker.requests[0].prompt_ids)
    ids = [token for event in rest for token in event["choices"][0].get("token_ids", [])]
    assert ids == tokenizer.encode("z") * 4
