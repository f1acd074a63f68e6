"""What each parameter of a request becomes in the worker's request and in the answer, over a scripted worker."""

from __future__ import annotations

import asyncio
import dataclasses

import pytest
from fakes import FakeAttentionWorker

from cluster.config.sections import FrontendConfig
from cluster.errors import InvalidRequest
from cluster.frontend.generation.detokenizer import Detokenizer
from cluster.frontend.generation.sampling import LIMITED
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.grpc_api.convert import parse_generation
from cluster.frontend.http.app import create_app
from cluster.model.generation_config import SamplingDefaults
from cluster.rpc import generation_pb2 as pb

CHAT = {"model": "moesaic-demo", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4}
COMPLETION = {"model": "moesaic-demo", "prompt": "hi there", "max_tokens": 4}


@pytest.fixture
def answered(make_app, call):
    """Send a request to a worker; its JSON answer."""

    def send(worker, path, body):
        async def scenario():
            return await call(make_app(worker), "POST", path, json=body)

        response = asyncio.run(scenario())
        assert response.status_code == 200, response.text
        return response.json()

    return send


def test_sampling_parameters_reach_the_worker(answered, tokenizer):
    worker = FakeAttentionWorker()
    fields = {
        "presence_penalty": 0.5,
        "frequency_penalty": -1,
        "repetition_penalty": 1.2,
        "logit_bias": {"5": 7, "12": -100},
        "allowed_token_ids": [5, 6],
        "stop_token_ids": [9],
        "include_stop_str_in_output": True,
        "skip_special_tokens": False,
        "prompt_logprobs": 3,
        "spaces_between_special_tokens": False,
    }
    answered(worker, "/v1/chat/completions", CHAT | fields)

    sampling = worker.requests[0].sampling
    assert (sampling.presence_penalty, sampling.frequency_penalty, sampling.repetition_penalty) == (0.5, -1.0, 1.2)
    assert dict(sampling.logit_bias) == {5: 7.0, 12: -100.0}
    assert (sampling.allowed_token_ids, sampling.stop_token_ids) == ((5, 6), (9,))
    assert (sampling.include_stop_str_in_output, sampling.skip_special_tokens) == (True, False)
    assert sampling.num_prompt_logprobs == 3


def test_null_is_the_default_of_every_parameter(answered):
    worker = FakeAttentionWorker()
    names = ("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias", "n", "bad_words")
    answered(worker, "/v1/chat/completions", CHAT | {"seed": 3} | dict.fromkeys(names))
    answered(worker, "/v1/chat/completions", CHAT | {"seed": 3})

    first, second = (request.sampling for request in worker.requests)
    assert first == second
    assert not first.has_penalties


def test_bad_words_are_tokens_at_the_beginning_and_after_a_space(answered, tokenizer):
    worker = FakeAttentionWorker()
    answered(worker, "/v1/completions", COMPLETION | {"bad_words": ["the"]})

    assert set(worker.requests[0].sampling.bad_words) == {tuple(tokenizer.encode(text)) for text in ("the", " the")}


@pytest.mark.parametrize(("keep", "num_left"), [(2, 2), (500, None), (-1, None)])
def test_prompts_are_truncated_from_the_left(answered, tokenizer, keep, num_left):
    worker = FakeAttentionWorker()
    ids = tokenizer.encode("one two three four")
    answer = answered(worker, "/v1/completions", COMPLETION | {"prompt": ids, "truncate_prompt_tokens": keep})

    assert worker.requests[0].prompt_ids == tuple(ids[-(num_left or len(ids)) :])
    assert answer["usage"]["prompt_tokens"] == len(worker.requests[0].prompt_ids)


def test_prompts_are_truncated_from_the_right_where_that_is_asked_for(answered, tokenizer):
    worker = FakeAttentionWorker()
    ids = tokenizer.encode("one two three four")
    answered(
        worker, "/v1/completions", COMPLETION | {"prompt": ids, "truncate_prompt_tokens": 2, "truncation_side": "right"}
    )
    assert worker.requests[0].prompt_ids == tuple(ids[:2])


def test_truncation_to_the_context_leaves_room_for_the_answer(answered):
    worker = FakeAttentionWorker()
    answered(worker, "/v1/completions", COMPLETION | {"prompt": [5] * 3000, "truncate_prompt_tokens": -1})

    assert len(worker.requests[0].prompt_ids) == 2048 - 4


@pytest.mark.parametrize("included", [False, True])
def test_stop_strings_are_in_the_text_on_demand_and_named_always(answered, tokenizer, included):
    worker = FakeAttentionWorker(tokenizer.encode("alpha beta STOP gamma"))
    body = CHAT | {"max_tokens": 50, "stop": "STOP", "include_stop_str_in_output": included}
    choice = answered(worker, "/v1/chat/completions", body)["choices"][0]

    assert choice["message"]["content"] == "alpha beta " + ("STOP" if included else "")
    assert (choice["finish_reason"], choice["stop_reason"]) == ("stop", "STOP")


@pytest.mark.parametrize(("included", "skipped", "text"), [(0, 1, "ok"), (1, 1, "ok"), (1, 0, "ok<|im_end|>")])
def test_end_tokens_are_text_on_demand(answered, tokenizer, included, skipped, text):
    worker = FakeAttentionWorker([*tokenizer.encode("ok"), 2], end_token=2)
    fields = {"include_stop_str_in_output": bool(included), "skip_special_tokens": bool(skipped)}
    choice = answered(worker, "/v1/chat/completions", CHAT | {"max_tokens": 50} | fields)["choices"][0]

    assert (choice["message"]["content"], choice["stop_reason"]) == (text, None)


def test_stop_token_ids_are_named(answered, tokenizer):
    end = tokenizer.encode("!")[0]
    worker = FakeAttentionWorker([*tokenizer.encode("ok"), end], end_token=end)
    choice = answered(worker, "/v1/chat/completions", CHAT | {"max_tokens": 9, "stop_token_ids": [end]})["choices"][0]

    assert (choice["message"]["content"], choice["stop_reason"]) == ("ok", end)


def test_token_ids_on_demand(answered, tokenizer):
    worker = FakeAttentionWorker(tokenizer.encode("z"))
    fields = {"return_token_ids": True, "return_tokens_as_token_ids": True, "logprobs": 1}
    choice = answered(worker, "/v1/completions", COMPLETION | fields)["choices"][0]

    assert choice["prompt_token_ids"] == list(worker.requests[0].prompt_ids) == tokenizer.encode("hi there")
    assert choice["token_ids"] == tokenizer.encode("z") * 4
    assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]


def test_included_stop_string_ends_the_text_however_it_arrives(tokenizer):
    ids = tokenizer.encode("one two STOP three")
    for size in range(1, len(ids) + 1):
        detokenizer = Detokenizer(tokenizer.decode, stop=("two ST", "OP"), includes_stop=True)
        texts = []
        for start in range(0, len(ids), size):
            piece = detokenizer.push(ids[start : start + size])
            texts.append(piece.text)
            if piece.stop is not None:
                break
        assert ("".join(texts), piece.stop) == ("one two ST", "two ST")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", 2.5),
        ("temperature", float("nan")),
        ("top_p", 0.0),
        ("min_p", -0.1),
        ("presence_penalty", 3.0),
        ("frequency_penalty", -3.0),
        ("repetition_penalty", 0.0),
        ("repetition_penalty", float("inf")),
        ("logit_bias", ((5, 200.0),)),
    ],
)
def test_every_face_has_the_same_bounds(make_service, field, value):
    with pytest.raises(InvalidRequest) as caught:
        make_service(FakeAttentionWorker()).prepare((5,), SamplingOptions(**{field: value}), "r")

    assert caught.value.param == field


AUTHOR = SamplingDefaults(
    temperature=0.6, top_p=0.9, top_k=20, min_p=0.1, repetition_penalty=1.1, presence_penalty=0.2, max_tokens=7
)


@pytest.fixture
def authored_service(tokenizer, info, metrics):
    """A service over a model whose author chose how it samples, and its worker."""
    worker = FakeAttentionWorker()
    info = dataclasses.replace(info, sampling=AUTHOR)
    return GenerationService(worker, tokenizer, info, FrontendConfig(), metrics), worker, info


def chosen_in(sampling):
    return {name: getattr(sampling, name) for name in AUTHOR.given()}


@pytest.mark.parametrize("nulls", [{}, dict.fromkeys(AUTHOR.given())])
def test_where_a_request_is_silent_the_author_chooses(authored_service, metrics, call, nulls):
    service, worker, info = authored_service
    app = create_app(service, worker, info, FrontendConfig(), metrics)

    async def scenario():
        for path, body in (("chat/completions", CHAT), ("completions", COMPLETION)):
            silent = {name: value for name, value in body.items() if name != "max_tokens"}
            answer = await call(app, "POST", f"/v1/{path}", json=silent | nulls)
            assert answer.status_code == 200, answer.text
        return [chosen_in(request.sampling) for request in worker.requests]

    chat, completion = asyncio.run(scenario())
    assert chat == AUTHOR.given()
    assert completion == AUTHOR.given() | {"max_tokens": 16}  # OpenAI's own default


def test_a_request_has_the_last_word_over_the_author(authored_service):
    service, _, _ = authored_service
    said = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0}
    said |= {"presence_penalty": 0.0, "max_tokens": 9}
    assert chosen_in(service.prepare((5,), SamplingOptions(**said), "r").sampling) == said
    assert chosen_in(service.prepare((5,), SamplingOptions(temperature=0.0), "r").sampling) == AUTHOR.given() | {
        "temperature": 0.0
    }


def test_the_authors_limit_leaves_a_long_prompt_its_rest(authored_service, info):
    service, _, _ = authored_service
    prompt = [5] * (info.max_model_len - 3)
    assert service.prepare(prompt, SamplingOptions(), "r").sampling.max_tokens == 3


def test_grpc_asks_the_author_too(authored_service):
    service, _, _ = authored_service
    silent = parse_generation(pb.GenerateRequest(prompt=pb.Prompt(text="x"), sampling=pb.SamplingOptions(n=1)))
    assert chosen_in(service.prepare((5,), silent.options, "r").sampling) == AUTHOR.given()
    zero = pb.GenerateRequest(prompt=pb.Prompt(text="x"), sampling=pb.SamplingOptions(temperature=0, top_k=-1))
    sampling = service.prepare((5,), parse_generation(zero).options, "r").sampling
    assert (sampling.temperature, sampling.top_k, sampling.top_p) == (0.0, 0, 0.9)


_LISTS = {
    "allowed_token_ids": [5, 6, 7],
    "logit_bias": {"5": 1, "6": 1, "7": 1},
    "bad_words": ["a", "b", "c"],
    "stop": ["a", "b", "c"],
    "stop_token_ids": [5, 6, 7],
    "logprob_token_ids": [5, 6, 7],
}


@pytest.mark.parametrize("name", sorted(_LISTS))
def test_lists_longer_than_the_server_takes_are_refused_with_both_numbers(make_app, call, name):
    worker = FakeAttentionWorker()

    async def scenario():
        app = make_app(worker, **{f"max_{name}": 2})
        return [
            await call(app, "POST", path, json=body | {name: _LISTS[name]})
            for path, body in (("/v1/chat/completions", CHAT), ("/v1/completions", COMPLETION))
        ]

    for response in asyncio.run(scenario()):
        assert response.status_code == 400
        error = response.json()["error"]
        assert error["param"] == name
        assert f"{name} has 3 entries, at most 2 are allowed" in error["message"]
    assert worker.requests == []


def test_every_list_of_a_request_has_a_limit():
    limited = {name for name in LIMITED if f"max_{name}" in FrontendConfig.model_fields}
    lists = {field.name for field in dataclasses.fields(SamplingOptions) if str(field.type).startswith("tuple")}

    assert limited == lists


def test_lists_have_the_same_limits_whichever_front_end_they_come_by(make_service):
    service = make_service(FakeAttentionWorker(), max_allowed_token_ids=1000)

    with pytest.raises(InvalidRequest, match="allowed_token_ids has 600000 entries, at most 1000 are allowed"):
        service.prepare([5], SamplingOptions(max_tokens=1, allowed_token_ids=(5,) * 600_000), "r")
