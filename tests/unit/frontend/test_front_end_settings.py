"""Settings of the front end that hold for every request: a root path, usage in every chunk, names of tokens."""

from __future__ import annotations

import asyncio
import json

import pytest
from fakes import AsgiCall, FakeAttentionWorker

CHAT = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}


@pytest.mark.parametrize("path", ["/v1/models", "/llm/v1/models"])
def test_routes_are_below_the_root_path_and_without_it(make_app, call, path):
    app = make_app(root_path="/llm", api_key="secret")

    async def scenario():
        refused = await call(app, "GET", path)
        return refused, await call(app, "GET", path, headers={"Authorization": "Bearer secret"})

    refused, answer = asyncio.run(scenario())
    assert (refused.status_code, answer.status_code) == (401, 200)


def test_another_prefix_is_no_root_path(make_app, call):
    app = make_app(root_path="/llm")
    assert asyncio.run(call(app, "GET", "/llmv1/models")).status_code == 404
    assert asyncio.run(call(app, "GET", "/other/v1/models")).status_code == 404


def chunks_of(app):
    async def scenario():
        answer = AsgiCall(app, "/v1/chat/completions", CHAT | {"stream": True, "logprobs": True, "top_logprobs": 1})
        await answer.run()
        return answer.text

    lines = asyncio.run(scenario()).splitlines()
    return [json.loads(line[6:]) for line in lines if line.startswith("data: {")]


@pytest.mark.parametrize("forced", [True, False])
def test_usage_in_every_chunk_can_be_forced(make_app, forced):
    chunks = chunks_of(make_app(FakeAttentionWorker(), force_include_usage=forced))
    assert [bool(chunk.get("usage")) for chunk in chunks] == [forced] * len(chunks)


@pytest.mark.parametrize("forced", [True, False])
def test_tokens_can_be_named_by_their_ids_everywhere(make_app, forced):
    chunks = chunks_of(make_app(FakeAttentionWorker(), return_tokens_as_token_ids=forced))
    logprobs = [c["logprobs"] for chunk in chunks for c in chunk["choices"] if c.get("logprobs")]
    assert logprobs
    assert all(token["token"].startswith("token_id:") == forced for chunk in logprobs for token in chunk["content"])


def test_load_counts_the_requests_being_answered(make_app, call):
    worker = FakeAttentionWorker(pause_after=1)
    app = make_app(worker)

    async def scenario():
        before = (await call(app, "GET", "/load")).json()
        answer = asyncio.create_task(AsgiCall(app, "/v1/chat/completions", CHAT).run())
        await worker.paused.wait()
        during = (await call(app, "GET", "/load")).json()
        worker.resume.set()
        await answer
        return before, during, (await call(app, "GET", "/load")).json()

    assert asyncio.run(scenario()) == ({"server_load": 0}, {"server_load": 1}, {"server_load": 0})


@pytest.mark.parametrize("media", ["application/x-www-form-urlencoded", "text/plain; charset=utf-8"])
def test_a_body_that_says_it_is_no_json_is_refused(make_app, call, media):
    body = {"content": json.dumps(CHAT), "headers": {"Content-Type": media}}
    answer = asyncio.run(call(make_app(), "POST", "/v1/chat/completions", **body))
    assert answer.status_code == 415
    assert media.partition(";")[0] in answer.json()["error"]["message"]


def test_the_last_words_of_a_stream_come_with_its_end(make_app):
    choices = [choice for chunk in chunks_of(make_app(FakeAttentionWorker())) for choice in chunk["choices"]]
    assert [choice["finish_reason"] for choice in choices if choice["finish_reason"]] == ["length"]
    assert choices[-1]["finish_reason"] == "length" and choices[-1]["delta"]["content"]
