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


def chunks_of(app, **extra):
    async def scenario():
        answer = AsgiCall(
            app, "/v1/chat/completions", CHAT | {"stream": True, "logprobs": True, "top_logprobs": 1} | extra
        )
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


def test_an_answer_tells_how_long_it_waited_and_took(make_app, call):
    app = make_app(FakeAttentionWorker(queued_s=0.25), per_request_metrics=True)
    metrics = asyncio.run(call(app, "POST", "/v1/chat/completions", json=CHAT)).json()["metrics"]
    assert metrics["queue_time_ms"] == 250
    assert metrics["generation_time_ms"] == pytest.approx(metrics["mean_itl_ms"] * (CHAT["max_tokens"] - 1))
    assert metrics["tokens_per_second"] > 0 and metrics["time_to_first_token_ms"] >= 0


@pytest.mark.parametrize(("settings", "extra"), [({}, {}), ({"per_request_metrics": True}, {"n": 2})])
def test_times_are_told_where_they_are_wanted_and_of_one_choice(make_app, call, settings, extra):
    answer = asyncio.run(call(make_app(**settings), "POST", "/v1/chat/completions", json=CHAT | extra))
    assert answer.status_code == 200 and "metrics" not in answer.json()


def test_a_stream_tells_its_times_with_its_usage(make_app):
    asked = {"stream_options": {"include_usage": True}}
    chunks = chunks_of(make_app(FakeAttentionWorker(), per_request_metrics=True), **asked)
    assert ["metrics" in chunk for chunk in chunks] == [False] * (len(chunks) - 1) + [True]
