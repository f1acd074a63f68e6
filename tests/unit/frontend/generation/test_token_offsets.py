"""`text_offset`: every token points at its place in the text, with echo and without, streamed and whole."""

from __future__ import annotations

import asyncio
import dataclasses
import json

import pytest
from byte_tokenizers import byte_fallback, byte_level, spaced_words
from fakes import FakeAttentionWorker
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cluster.config.sections import FrontendConfig
from cluster.frontend.generation.sequence import SamplingOptions
from cluster.frontend.generation.service import GenerationService
from cluster.frontend.generation.token_offsets import offsets_in_prompt
from cluster.frontend.http.app import create_app
from cluster.types import FinishReason

BROKEN = "\N{REPLACEMENT CHARACTER}"
TOKENIZERS = {"level": byte_level(), "fallback": byte_fallback()}
TEXTS = st.text(
    st.sampled_from("ab hé日本\N{GRINNING FACE}▁<s>\n") | st.characters(exclude_categories=["Cs"]), max_size=8
)
FEW = settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


@pytest.fixture
def complete(info, metrics, call):
    """A completion of `prompt` whose model says `script`: its text, its log-probabilities and all token ids."""

    def send(tokenizer, prompt, script, *, stream, **fields):
        worker = FakeAttentionWorker(script or (4,), chunk_size=1 + len(script) % 3)
        own = dataclasses.replace(info, vocab_size=tokenizer.vocab_size, eos_token_ids=())
        config = FrontendConfig()
        app = create_app(GenerationService(worker, tokenizer, own, config, metrics), worker, own, config, metrics)
        body = {"model": own.name, "prompt": prompt, "max_tokens": max(len(script), 1), "logprobs": 0, **fields}
        response = asyncio.run(call(app, "POST", "/v1/completions", json=body | {"stream": stream}))
        assert response.status_code == 200, response.text
        ids = [*worker.requests[0].prompt_ids, *(script or (4,))]
        if not stream:
            choice = response.json()["choices"][0]
            return choice["text"], choice["logprobs"], ids
        events = [json.loads(event[6:]) for event in response.text.split("\n\n") if event.startswith("data: {")]
        choices = [event["choices"][0] for event in events]
        logprobs = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        joined = {name: [item for part in logprobs for item in part[name]] for name in ("tokens", "text_offset")}
        return "".join(choice["text"] for choice in choices), joined, ids

    return send


def check_places(tokenizer, text, offsets, ids, *, skips=True):
    """Each token lies where its bytes are: behind the whole characters of the tokens before it."""
    assert len(offsets) == len(ids)
    assert text == tokenizer.decode(ids, skip_special_tokens=skips)
    for index, (offset, token_id) in enumerate(zip(offsets, ids, strict=True)):
        before = tokenizer.decode(ids[:index], skip_special_tokens=skips)
        assert text[:offset] == before or (before.endswith(BROKEN) and text[:offset] == before[:-1])
        raw = tokenizer.text_bytes(token_id, opens_text=not before, skip_special_tokens=skips)
        own = raw.decode(errors="replace")
        if BROKEN not in own:
            assert text[offset:].startswith(own), (text, offset, own)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("stream", [False, True])
@FEW
@given(data=st.data())
def test_tokens_begin_where_their_offset_says(complete, kind, stream, data):
    tokenizer = TOKENIZERS[kind]
    any_ids = st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12)
    ids_of_text = TEXTS.map(lambda text: tokenizer.encode(text, add_special_tokens=False))
    prompt = data.draw(any_ids | TEXTS.map(tokenizer.encode).filter(bool), label="prompt")
    script = data.draw(any_ids | ids_of_text, label="script")
    text, logprobs, ids = complete(tokenizer, prompt, script, stream=stream, echo=True)
    check_places(tokenizer, text, logprobs["text_offset"], ids)


@pytest.mark.parametrize("stream", [False, True])
def test_prompt_that_ends_in_half_a_surrogate_leaves_no_character_open(complete, stream):
    """Of ED A0 no byte makes a character: both are broken at once, not when the next token comes."""
    tokenizer = TOKENIZERS["fallback"]
    half = [next(i for i in range(300) if tokenizer.token_bytes(i) == bytes([byte])) for byte in (0xED, 0xA0)]

    text, logprobs, ids = complete(tokenizer, half, [4], stream=stream, echo=True)

    check_places(tokenizer, text, logprobs["text_offset"], ids)


@pytest.mark.parametrize("kind", TOKENIZERS)
@FEW
@given(data=st.data())
def test_offsets_count_from_the_answer_without_echo(complete, kind, data):
    tokenizer = TOKENIZERS[kind]
    script = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1), min_size=1, max_size=12))
    whole = complete(tokenizer, [1, 9], script, stream=False, skip_special_tokens=False)
    text, logprobs, _ = complete(tokenizer, [1, 9], script, stream=True, skip_special_tokens=False)
    assert (text, logprobs["text_offset"]) == (whole[0], whole[1]["text_offset"])
    begin, prompt = len("<s>"), tokenizer.decode([1, 9], skip_special_tokens=False)
    offsets = [0, begin, *(len(prompt) + offset for offset in logprobs["text_offset"])]
    check_places(tokenizer, prompt + text, offsets, [1, 9, *script], skips=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(text=TEXTS)
def test_a_prompts_own_text_is_what_its_tokens_are_found_in(kind, text):
    tokenizer = TOKENIZERS[kind]
    ids = tokenizer.encode(text)
    offsets = offsets_in_prompt(tokenizer, ids, text)
    shown = bytearray()
    for offset, token_id in zip(offsets, ids, strict=True):
        complete_before = bytes(shown).decode(errors="ignore")
        assert text[:offset] == complete_before
        name = tokenizer.special_text(token_id)
        if name is not None and not text.startswith(name, offset):
            continue  # put there by the tokenizer
        raw = tokenizer.text_bytes(token_id, opens_text=not shown, skip_special_tokens=False)
        assert text[offset:].encode()[len(shown) - len(complete_before.encode()) :].startswith(raw)
        shown += raw


@pytest.mark.parametrize("stream", [False, True])
def test_emoji_after_a_begin_token_in_numbers(complete, stream):
    tokenizer = byte_fallback()
    face = [7 - 3 + byte for byte in "\N{GRINNING FACE}".encode()]  # after four special tokens
    text, logprobs, ids = complete(tokenizer, "a\N{GRINNING FACE}b", [*face, 5], stream=stream, echo=True)
    assert text == "a\N{GRINNING FACE}b\N{GRINNING FACE}\x01"
    assert ids == [1, tokenizer.encode("a")[1], *face, tokenizer.encode("b")[-1], *face, 5]
    assert logprobs["text_offset"] == [0, 0, 1, 1, 1, 1, 2, 3, 3, 3, 3, 4]
    assert logprobs["tokens"][:3] == ["<s>", " a", "bytes:\\xf0"]


@pytest.mark.parametrize("stream", [False, True])
def test_a_character_that_the_prompt_leaves_unfinished_is_finished_by_the_answer(complete, stream):
    tokenizer = byte_fallback()
    start, end = [4 + 0xE6, 4 + 0x97], [4 + 0xA5]
    prompt = [*tokenizer.encode("a"), *start]
    text, logprobs, _ = complete(tokenizer, prompt, end, stream=stream, echo=True)
    assert (text, logprobs["text_offset"]) == ("a\u65e5", [0, 0, 1, 1, 1])
    text, logprobs, _ = complete(tokenizer, prompt, end, stream=stream)
    assert (text, logprobs["text_offset"]) == ("\u65e5", [0])


def test_text_that_the_tokenizer_changed_is_placed_by_its_own_record():
    tokenizer = spaced_words()
    text = "Hello  WORLDly!"
    ids = tokenizer.encode(text)
    assert offsets_in_prompt(tokenizer, ids, text) == [0, 7, 12, 14]
    assert offsets_in_prompt(tokenizer, ids, tokenizer.decode(ids)) == [0, 6, 11, 13]


def test_the_token_that_ends_a_sequence_stands_behind_its_text(tokenizer, make_service):
    script = tokenizer.encode("hi")
    service = make_service(FakeAttentionWorker([*script, 2], end_token=2))

    async def collect():
        stream = service.generate([5], SamplingOptions(num_logprobs=0, max_tokens=9), "r")
        return [chunk async for chunk in stream]

    chunks = asyncio.run(collect())
    assert chunks[-1].finish_reason is FinishReason.STOP
    assert [entry.offset for chunk in chunks for entry in chunk.logprobs][-1] == 2
