"""Several answers to one prompt: one admission, one prompt in the usage, interleaved choices."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator

import pytest
from fakes import AsgiCall, FakeAttentionWorker

from cluster.config.sections import FrontendConfig
from cluster.errors import Overloaded
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.http.app import create_app
from cluster.types import FinishReason, GenerationRequest, RequestId, TokenChunk

CHAT = {"model": "moesaic-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"model": "moesaic-demo", "prompt": "hi there", "max_tokens": 4}


def events_of(text):
    return [json.loads(line[6:]) for line in text.splitlines() if line.startswith("data: {")]


class SlowlyTaking:
    """A worker that takes choices one by one, when told; the `refused`-th is refused. Tokens come at once."""

    def __init__(self, refused: int | None = None) -> None:
        self.refused = refused
        self.turn = asyncio.Semaphore(0)
        self.started: list[RequestId] = []
        self.aborted: set[RequestId] = set()

    async def generate(self, request: GenerationRequest) -> AsyncIterator[TokenChunk]:
        place = len(self.started)
        self.started.append(request.request_id)
        if place:
            await self.turn.acquire()
        if place == self.refused:
            raise Overloaded("the queue is full")
        yield TokenChunk(token_ids=())
        for token in range(request.sampling.max_tokens):
            last = token == request.sampling.max_tokens - 1
            yield TokenChunk(token_ids=(300,), finish_reason=FinishReason.LENGTH if last else None)
            await asyncio.sleep(0)

    async def abort(self, request_id: RequestId) -> None:
        self.aborted.add(request_id)


@pytest.mark.parametrize("path", ["/v1/chat/completions", "/v1/completions"])
def test_n_choices_count_their_prompt_once(make_app, call, path):
    worker = FakeAttentionWorker(num_cached_tokens=1)
    body = (CHAT if "chat" in path else COMPLETION) | {"n": 3, "seed": 8}

    async def scenario():
        return await call(make_app(worker), "POST", path, json=body)

    answer = asyncio.run(scenario()).json()
    num_prompt = len(worker.requests[0].prompt_ids)
    assert [choice["index"] for choice in answer["choices"]] == [0, 1, 2]
    assert answer["usage"]["prompt_tokens"] == num_prompt
    assert answer["usage"]["completion_tokens"] == 12
    assert answer["usage"]["prompt_tokens_details"] == {"cached_tokens": 1}
    assert sorted((request.choice, request.sampling.seed) for request in worker.requests) == [(0, 8), (1, 8), (2, 8)]
    assert len({request.request_id for request in worker.requests}) == 3
    assert answer["system_fingerprint"].startswith("fp_")


def test_choices_of_several_prompts_are_numbered_prompt_by_prompt(make_app, call, tokenizer):
    worker = FakeAttentionWorker()

    async def scenario():
        body = COMPLETION | {"prompt": ["a", "b b"], "n": 2, "echo": True}
        return await call(make_app(worker), "POST", "/v1/completions", json=body)

    answer = asyncio.run(scenario()).json()
    starts = ("a", "a", "b b", "b b")
    assert all(choice["text"].startswith(start) for choice, start in zip(answer["choices"], starts, strict=True))
    by_choice = {request.choice: request.prompt_ids for request in worker.requests}
    assert by_choice[0] == by_choice[1] == tuple(tokenizer.encode("a"))
    assert by_choice[2] == by_choice[3] == tuple(tokenizer.encode("b b"))
    assert answer["usage"]["prompt_tokens"] == len(by_choice[0]) + len(by_choice[2])


def test_streamed_choices_have_an_index_and_an_end_each(make_app, call):
    body = CHAT | {"n": 3, "stream": True, "stream_options": {"include_usage": True}}

    async def scenario():
        return await call(make_app(), "POST", "/v1/chat/completions", json=body)

    *events, usage = events_of(asyncio.run(scenario()).text)
    choices = [event["choices"][0] for event in events]
    assert {choice["index"] for choice in choices} == {0, 1, 2}
    ends = [(choice["index"], choice["finish_reason"]) for choice in choices if choice["finish_reason"]]
    assert sorted(ends) == [(0, "length"), (1, "length"), (2, "length")]
    assert sum(choice["delta"].get("role") == "assistant" for choice in choices) == 3
    first_ends = next(place for place, choice in enumerate(choices) if choice["finish_reason"])
    assert {choice["index"] for choice in choices[:first_ends]} == {0, 1, 2}, "they take turns"
    assert usage["usage"]["completion_tokens"] == 12


@pytest.mark.parametrize("refused", [0, 1, 2])
@pytest.mark.parametrize("stream", [False, True])
def test_all_choices_are_refused_when_one_is(make_app, stream, refused):
    worker = SlowlyTaking(refused)

    async def scenario():
        call = AsgiCall(make_app(worker), "/v1/chat/completions", CHAT | {"n": 3, "stream": stream, "max_tokens": 500})
        task = asyncio.create_task(call.run())
        async with asyncio.timeout(5):
            while len(worker.started) < 3 and not task.done():
                await asyncio.sleep(0)
            for _ in range(50):  # the first choice has long had its tokens
                await asyncio.sleep(0)
            assert refused == 0 or not call.sent
            worker.turn.release()
            worker.turn.release()
            await task
        return call

    call = asyncio.run(scenario())
    assert call.status == 429, call.text
    assert worker.aborted == set(worker.started)


def test_nothing_is_sent_before_the_last_choice_was_taken_and_then_everything(make_app):
    worker = SlowlyTaking()

    async def scenario():
        call = AsgiCall(make_app(worker), "/v1/chat/completions", CHAT | {"n": 2, "stream": True})
        task = asyncio.create_task(call.run())
        async with asyncio.timeout(5):
            while len(worker.started) < 2:
                await asyncio.sleep(0)
            for _ in range(50):
                await asyncio.sleep(0)
            assert not call.sent
            worker.turn.release()
            await task
        return call

    call = asyncio.run(scenario())
    assert call.status == 200
    reasons = [(c["index"], c["finish_reason"]) for e in events_of(call.text) for c in e["choices"]]
    assert [r for r in reasons if r[1]] == [(0, "length"), (1, "length")]
    assert worker.aborted == set()


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("by_header", [False, True])
def test_abort_ends_an_answer_with_what_it_has(make_app, call, tokenizer, stream, by_header):
    worker = FakeAttentionWorker(tokenizer.encode(" abc"), pause_after=2)

    async def scenario():
        app = make_app(worker)
        body = CHAT | {"n": 2, "stream": stream}
        open_call = AsgiCall(app, "/v1/chat/completions", body, headers=[(b"x-request-id", b"mine")])
        task = asyncio.create_task(open_call.run())
        async with asyncio.timeout(5):
            while worker.num_emitted < 4:
                await asyncio.sleep(0)
            name = "mine" if by_header else str(worker.requests[0].request_id).rpartition("-")[0]
            nobody = await call(app, "POST", "/abort_requests", json={"request_ids": ["chatcmpl-nobody"]})
            assert nobody.json() == {"aborted": []}
            assert not task.done()
            answer = await call(app, "POST", "/abort_requests", json={"request_ids": [name, "nobody"]})
            await task
            again = await call(app, "POST", "/abort_requests", json={"request_ids": [name]})
        assert answer.json() == {"aborted": [name]}
        assert again.json() == {"aborted": []}, "it is over"
        return open_call

    open_call = asyncio.run(scenario())
    assert open_call.status == 200
    if stream:
        choices = [choice for event in events_of(open_call.text) for choice in event["choices"]]
        assert open_call.text.endswith("data: [DONE]\n\n")
    else:
        choices = json.loads(open_call.text)["choices"]
        assert json.loads(open_call.text)["usage"]["completion_tokens"] == 4
    assert [c["finish_reason"] for c in choices if c["finish_reason"]] == ["abort", "abort"]
    assert set(worker.aborted) == set(worker.closed) == {request.request_id for request in worker.requests}


class _Joined:
    """Front ends of one application, without Ray between them."""

    def __init__(self, num_silent=0):
        self.services = []
        self._num_silent = num_silent

    async def abort_answers(self, names):
        ended = [service.abort_answers(names) for service in self.services]
        return frozenset().union(*ended), self._num_silent


@pytest.mark.parametrize("name", ["header", "body", "answer"])
def test_any_front_end_aborts_what_another_one_gives(make_service, info, metrics, call, name):
    worker, peers = FakeAttentionWorker(pause_after=2), _Joined(num_silent=1)

    def make():
        service = make_service(worker)
        peers.services.append(service)
        return create_app(service, worker, info, FrontendConfig(), metrics, peers=peers)

    async def scenario():
        first, second = make(), make()
        body = CHAT | {"n": 2} | ({"request_id": "body"} if name == "body" else {})
        open_call = AsgiCall(first, "/v1/chat/completions", body, headers=[(b"x-request-id", b"header")])
        task = asyncio.create_task(open_call.run())
        async with asyncio.timeout(5):
            while worker.num_emitted < 4:
                await asyncio.sleep(0)
            given = str(worker.requests[0].request_id).rpartition("-")[0] if name == "answer" else name
            answer = await call(second, "POST", "/abort_requests", json={"request_ids": ["nobody", given]})
            await task
        return given, answer.json(), json.loads(open_call.text)

    given, answer, body = asyncio.run(scenario())
    assert answer == {"aborted": [given], "silent_front_ends": 1}
    assert [choice["finish_reason"] for choice in body["choices"]] == ["abort", "abort"]
    assert set(worker.aborted) == {request.request_id for request in worker.requests}


def test_service_aborts_between_chunks_too(make_service, tokenizer):
    service = make_service(FakeAttentionWorker(tokenizer.encode("abc")))

    async def scenario():
        request = service.prepare((5, 6), SamplingOptions(max_tokens=50), RequestId("r"))
        stream = service.stream(request)
        first = await anext(stream)
        assert service.abort(RequestId("r"))
        rest = [chunk async for chunk in stream]
        assert not service.abort(RequestId("r"))
        return first, rest

    first, rest = asyncio.run(scenario())
    assert first.finish_reason is None
    assert [chunk.finish_reason for chunk in rest] == [FinishReason.ABORT]
    assert rest[0].usage.completion_tokens == 1
