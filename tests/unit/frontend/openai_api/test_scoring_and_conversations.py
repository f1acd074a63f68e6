"""Prompts that are only scored, log-probabilities of chosen tokens, token ids, and what conversations may hold."""

from __future__ import annotations

import asyncio
import json

import pytest
import torch
from fakes import FakeAttentionWorker

from actors.engine.sampling import sample
from cluster.errors import InvalidRequest
from cluster.frontend.generation.chat_template import ChatTemplate
from cluster.types import SamplingParams

CHAT = {"model": "moesaic-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"model": "moesaic-demo", "prompt": [5, 6, 7], "max_tokens": 4}
CALL = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 1}'}}
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}


@pytest.fixture
def post(make_app, call):
    """Send a body to a front end over a scripted worker: status, answer, and the worker."""

    def send(path, body, **config):
        worker = FakeAttentionWorker()
        response = asyncio.run(call(make_app(worker, **config), "POST", f"/v1/{path}", json=body))
        is_stream = response.headers["content-type"].startswith("text/event-stream")
        events = [json.loads(part[6:]) for part in response.text.split("\n\n") if part.startswith("data: {")]
        return response.status_code, events if is_stream else response.json(), worker

    return send


@pytest.mark.parametrize("stream", [False, True])
def test_a_prompt_is_scored_without_an_answer(post, stream):
    asked = {"max_tokens": 0, "echo": True, "logprobs": 1, "stream": stream, "return_token_ids": True}
    status, answer, worker = post("completions", COMPLETION | asked)
    assert status == 200, answer
    choices = [event["choices"][0] for event in answer] if stream else answer["choices"]
    scored = next(choice["logprobs"] for choice in choices if choice["logprobs"])
    assert (len(scored["tokens"]), scored["token_logprobs"]) == (3, [None, -6.0, -7.0])
    assert len(scored["text_offset"]) == 3
    assert [choice["finish_reason"] for choice in choices][-1] == "length"
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == []
    assert worker.requests[0].sampling.max_tokens == 1
    if not stream:
        assert answer["usage"]["completion_tokens"] == 0
        assert answer["usage"]["prompt_tokens"] == answer["usage"]["total_tokens"] == 3


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("completions", COMPLETION | {"max_tokens": 0, "prompt_logprobs": 0}),
        ("completions", COMPLETION | {"max_tokens": 0, "echo": True}),
        ("completions", COMPLETION | {"max_tokens": 0, "echo": True, "prompt": ["a", "b"], "n": 2}),
        ("chat/completions", CHAT | {"max_tokens": 0, "prompt_logprobs": 1}),
    ],
)
def test_scoring_needs_echo_or_prompt_logprobs(post, path, body):
    status, answer, _ = post(path, body)
    assert status == 200, answer
    assert answer["usage"]["completion_tokens"] == 0
    silent = {name: value for name, value in body.items() if name not in ("echo", "prompt_logprobs")}
    status, answer, _ = post(path, silent)
    assert (status, answer["error"]["param"]) == (400, "max_tokens")


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_every_chunk_has_its_token_ids(post, path):
    body = (CHAT if "chat" in path else COMPLETION) | {"stream": True, "return_token_ids": True}
    _, events, worker = post(path, body)
    choices = [event["choices"][0] for event in events]
    assert [token_id for choice in choices for token_id in choice["token_ids"]] == [10, 11, 12, 10]
    holders = events if "chat" in path else choices
    assert holders[0]["prompt_token_ids"] == list(worker.requests[0].prompt_ids)
    assert not any("prompt_token_ids" in holder for holder in holders[1:])


def test_top_logprobs_of_zero_asks_for_nothing_more(post):
    assert post("chat/completions", CHAT | {"top_logprobs": 0})[1]["choices"][0]["logprobs"] is None
    entries = post("chat/completions", CHAT | {"logprobs": True, "top_logprobs": 0})[1]["choices"][0]["logprobs"]
    assert [entry["top_logprobs"] for entry in entries["content"]] == [[]] * 4
    assert post("chat/completions", CHAT | {"top_logprobs": 1})[0] == 400


@pytest.mark.parametrize("cap", [3, 5000])
def test_all_log_probabilities_up_to_the_cap(post, info, cap):
    given = min(cap, info.vocab_size)
    asked = {"logprobs": True, "top_logprobs": -1}
    sampling = post("chat/completions", CHAT | asked, max_logprobs=cap)[2].requests[0].sampling
    assert sampling.num_logprobs == given
    sampling = post("completions", COMPLETION | {"logprobs": -1}, max_logprobs=cap)[2].requests[0].sampling
    assert sampling.num_logprobs == given


@pytest.mark.parametrize("cap", [3, 10**6])
def test_all_of_a_prompt_are_given_where_the_cap_allows_them(post, info, cap):
    status, answer, worker = post("chat/completions", CHAT | {"prompt_logprobs": -1}, max_logprobs=cap)
    if cap < info.vocab_size:
        assert (status, answer["error"]["param"]) == (400, "prompt_logprobs")
    else:
        assert worker.requests[0].sampling.num_prompt_logprobs == info.vocab_size


@pytest.mark.parametrize("value", [-2, 4])
@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("completions", COMPLETION, "logprobs"),
        ("completions", COMPLETION, "prompt_logprobs"),
        ("chat/completions", CHAT | {"logprobs": True}, "top_logprobs"),
        ("chat/completions", CHAT, "prompt_logprobs"),
    ],
)
def test_more_log_probabilities_than_the_cap_are_refused_by_name(post, path, body, param, value):
    status, answer, _ = post(path, body | {param: value}, max_logprobs=3)
    assert (status, answer["error"]["param"]) == (400, param)


def test_log_probabilities_of_tokens_that_the_client_names():
    logits = torch.tensor([[0.0, 1.0, 2.0, 3.0]])
    params = SamplingParams(max_tokens=1, temperature=0, num_logprobs=2, logprob_token_ids=(1, 0, 1))
    (token,), (entry,) = sample(logits, [params], [(0, 0)], [()], [None])
    reference = torch.log_softmax(logits[0], dim=-1)
    assert token == 3
    assert [token_id for token_id, _ in entry.top] == [3, 1, 0]
    assert [value for _, value in entry.top] == pytest.approx(reference[[3, 1, 0]].tolist())


def test_named_tokens_reach_the_worker_and_need_log_probabilities(post):
    named = {"logprob_token_ids": [9, 8]}
    for path, body in (("completions", COMPLETION | {"logprobs": 1}), ("chat/completions", CHAT | {"logprobs": True})):
        assert post(path, body | named)[2].requests[0].sampling.logprob_token_ids == (9, 8)
        silent = {name: value for name, value in body.items() if name != "logprobs"}
        assert post(path, silent | named)[1]["error"]["param"] == "logprob_token_ids"
        assert post(path, body | {"logprob_token_ids": [10**6]})[1]["error"]["param"] == "logprob_token_ids"


def rendered(post, make_app, call, body, path="/tokenize"):
    async def scenario():
        app = make_app()
        answer = await call(app, "POST", path, json={"model": "moesaic-demo", **body})
        assert answer.status_code == 200, answer.text
        return (await call(app, "POST", "/detokenize", json={"tokens": answer.json()["tokens"]})).json()["prompt"]

    return asyncio.run(scenario())


def test_the_last_message_goes_on(post, make_app, call):
    messages = [{"role": "user", "content": "say"}, {"role": "assistant", "content": "An apple a day"}]
    prompt = rendered(post, make_app, call, {"messages": messages, "continue_final_message": True})
    assert prompt.endswith("An apple a day")
    explicit = {"messages": messages, "continue_final_message": True, "add_generation_prompt": False}
    assert rendered(post, make_app, call, explicit) == prompt
    status, answer, _ = post("chat/completions", CHAT | explicit | {"add_generation_prompt": True})
    assert (status, answer["error"]["param"]) == (400, "continue_final_message")
    status, answer, _ = post("chat/completions", CHAT | explicit | {"echo": True})
    assert status == 200 and answer["choices"][0]["message"]["content"].startswith("An apple a day")
    _, events, _ = post("chat/completions", CHAT | explicit | {"echo": True, "stream": True})
    assert events[0]["choices"][0]["delta"]["content"] == "An apple a day"


@pytest.mark.parametrize(
    ("template", "content", "prompt"),
    [
        (
            "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}",
            "go on ",
            "<user>a</><assistant>go on ",
        ),
        ("{% for m in messages %}{{ m.content | trim }};{% endfor %}", "go on ", "a;go on"),
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "a", "aa"),
    ],
)
def test_what_is_continued_ends_where_the_template_puts_it(template, content, prompt):
    chat = ChatTemplate(template, {}, origin="t")
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": content}]
    assert chat.render(messages, add_generation_prompt=False, continue_final_message=True) == prompt


def test_nothing_to_continue_is_refused():
    hides = ChatTemplate("{{ messages[0].content }}", {}, origin="t")
    for last in ({"role": "assistant", "content": ""}, {"role": "assistant", "content": "x"}):
        with pytest.raises(InvalidRequest) as caught:
            hides.render([{"role": "user", "content": "a"}, last], continue_final_message=True)
        assert caught.value.param == "continue_final_message"


MAPPINGS = (
    "{% for m in messages %}{% for c in m.tool_calls %}{% for k, v in c.function.arguments.items() %}{{ k }}={{ v }}"
)
MAPPINGS += "{% endfor %}{% endfor %}{% endfor %}"
STRINGS = "{% for m in messages %}{% for c in m.tool_calls %}{{ '>' + c.function.arguments }}{% endfor %}{% endfor %}"


@pytest.mark.parametrize(("template", "prompt"), [(MAPPINGS, "a=1"), (STRINGS, '>{"a": 1}')])
def test_tool_calls_suit_templates_of_both_kinds(tokenizer, make_service, template, prompt):
    from cluster.frontend.openai_api.schema import ChatRequest

    messages = [
        {"role": "user", "content": "1 + 1?"},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "2"}]},
    ]
    body = ChatRequest.model_validate(CHAT | {"messages": messages})
    shown = [message.for_template() for message in body.messages]
    assert ChatTemplate(template, {}, origin="t").render(shown) == prompt


@pytest.mark.parametrize("arguments", ["", "  ", None, "{}"])
def test_calls_without_arguments(post, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    messages = [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}, {"role": "tool", "content": None}]
    assert post("chat/completions", CHAT | {"messages": messages})[0] == 200


@pytest.mark.parametrize("arguments", ["{", "[1]", "3", 3])
def test_arguments_that_are_no_object_are_refused(post, arguments):
    call = {"id": "1", "type": "function", "function": {"name": "now", "arguments": arguments}}
    status, answer, _ = post(
        "chat/completions", CHAT | {"messages": [*CHAT["messages"], {"role": "assistant", "tool_calls": [call]}]}
    )
    assert (status, answer["error"]["param"]) == (400, "messages")


@pytest.mark.parametrize(
    "message",
    [
        {"role": "critic", "content": "hm"},
        {"role": "function", "name": "f", "content": "2"},
        {"role": "assistant", "content": None},
        {"role": "assistant"},
        {"role": "tool", "tool_call_id": "1", "content": None},
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "input_text", "text": "b"}]},
    ],
)
def test_messages_that_are_taken(post, message):
    status, answer, _ = post("chat/completions", CHAT | {"messages": [message, *CHAT["messages"]]})
    assert status == 200, answer


def test_tools_are_shown_to_the_model_but_not_called(post):
    assert ChatTemplate("{{ tools[0].function.name }}", {}, origin="t").render([], tools=[TOOL]) == "add"
    assert ChatTemplate("{{ tools is none }}", {}, origin="t").render([], tools=[]) == "True"
    assert post("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": "none"})[0] == 200
    assert post("chat/completions", CHAT | {"tools": [], "tool_choice": "auto"})[0] == 200
    for asked in ({}, {"tool_choice": "auto"}):
        assert post("chat/completions", CHAT | {"tools": [TOOL]} | asked)[1]["error"]["param"] == "tools"
    for choice in ("required", {"type": "function", "function": {"name": "add"}}):
        status, answer, _ = post("chat/completions", CHAT | {"tools": [TOOL], "tool_choice": choice})
        assert (status, answer["error"]["param"]) == (400, "tool_choice")
