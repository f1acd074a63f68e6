"""A character whose bytes end with max_tokens: one U+FFFD, on every way out of the front end."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from byte_tokenizers import byte_fallback
from fakes import FakeAttentionWorker

from cluster.config.sections import FrontendConfig
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.grpc_api.convert import stream_response, whole_response
from cluster.frontend.http.app import create_app

TOKENIZER = byte_fallback()
FACE = [4 + byte for byte in "\N{GRINNING FACE}".encode()]
A = TOKENIZER.encode("a")[1]
SCRIPT = (*FACE, A, *FACE)
SHOWN = "\N{GRINNING FACE} a\N{REPLACEMENT CHARACTER}"
CUT = len(SCRIPT) - 1


@pytest.fixture(params=[1, 2, 3, 5])
def service(request, info, metrics):
    """Over a worker that writes a face, a letter and most of a face, in chunks of every size."""
    own = dataclasses.replace(info, vocab_size=TOKENIZER.vocab_size, eos_token_ids=())
    worker = FakeAttentionWorker(SCRIPT, chunk_size=request.param)
    return GenerationService(worker, TOKENIZER, own, FrontendConfig(), metrics), own


def chunks_of(service, **options):
    async def collect():
        return [chunk async for chunk in service.generate([A], SamplingOptions(max_tokens=CUT, **options), "r")]

    return asyncio.run(collect())


@pytest.mark.parametrize("stop", [(), ("zzz",), ("\N{REPLACEMENT CHARACTER}z", "az")])
def test_the_command_line_and_grpc_show_one_replacement(service, stop):
    chunks = chunks_of(service[0], stop=stop)
    assert "".join(chunk.text for chunk in chunks) == SHOWN
    assert whole_response("m", [chunks]).choices[0].text == SHOWN
    assert "".join(stream_response(0, chunk).text for chunk in chunks) == SHOWN


@pytest.mark.parametrize("echo", [False, True])
def test_http_streams_what_it_answers_whole(service, metrics, call, echo):
    service, info = service
    app = create_app(service, None, info, FrontendConfig(), metrics)
    body = {"model": info.name, "prompt": [A], "max_tokens": CUT, "echo": echo}

    async def scenario():
        whole = await call(app, "POST", "/v1/completions", json=body)
        stream = await call(app, "POST", "/v1/completions", json=body | {"stream": True})
        return whole.json()["choices"][0]["text"], stream.text

    whole, stream = asyncio.run(scenario())
    events = [json.loads(event[6:]) for event in stream.split("\n\n") if event.startswith("data: {")]
    assert "".join(event["choices"][0]["text"] for event in events) == whole == ("a" if echo else "") + SHOWN


def test_a_stop_string_behind_a_broken_character_is_found(service):
    chunks = chunks_of(service[0], stop=("\N{REPLACEMENT CHARACTER}",))
    assert "".join(chunk.text for chunk in chunks) == SHOWN[:-1]
    assert chunks[-1].stop_reason == "\N{REPLACEMENT CHARACTER}"


def test_detokenize_answers_the_same(service, metrics, call):
    service, info = service
    app = create_app(service, None, info, FrontendConfig(), metrics)
    answer = asyncio.run(call(app, "POST", "/detokenize", json={"tokens": [*FACE, *FACE[:3]]}))
    assert answer.json()["prompt"] == "\N{GRINNING FACE}\N{REPLACEMENT CHARACTER}"
