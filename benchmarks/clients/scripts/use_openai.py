"""The official client: models, chat, completions, streams, log probabilities, errors, asynchronous calls.

use_openai.py URL MODEL FOLDER
"""

from __future__ import annotations

import asyncio
import sys

import openai


def main(url: str, model: str, _folder: str) -> None:
    """Raises AssertionError or the client's own error."""
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    assert [card.id for card in client.models.list()] == [model]
    assert client.models.retrieve(model).id == model
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    whole = client.chat.completions.create(model=model, messages=messages, temperature=0, max_tokens=16)
    usage = whole.usage
    assert usage is not None and usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    text, stream_usage = _streamed(client, model, messages)
    assert text == whole.choices[0].message.content
    assert stream_usage == usage.total_tokens
    raw = client.chat.completions.with_raw_response.create(
        model=model, messages=messages, max_tokens=1, extra_headers={"X-Request-Id": "mine-1"}
    )
    assert raw.headers["x-request-id"] == "mine-1"
    several = client.chat.completions.create(
        model=model, messages=messages, n=3, seed=1, max_tokens=8, temperature=1, logprobs=True, top_logprobs=2
    )
    assert [choice.index for choice in several.choices] == [0, 1, 2]
    content = several.choices[0].logprobs.content if several.choices[0].logprobs else None
    assert content and all(len(token.top_logprobs) == 2 for token in content)
    _complete(client, model)
    _be_refused(client, model)
    asyncio.run(_ask_at_once(url, model))
    print("models, chat, completions, streams, usage, n, logprobs, echo, errors, async: right")


def _streamed(client: openai.OpenAI, model: str, messages: list) -> tuple[str, int]:
    text, total = "", 0
    for chunk in client.chat.completions.create(
        model=model,
        messages=messages,
        temperature=0,
        max_tokens=16,
        stream=True,
        stream_options={"include_usage": True},
    ):
        text += "".join(choice.delta.content or "" for choice in chunk.choices)
        total = chunk.usage.total_tokens if chunk.usage else total
    return text, total


def _complete(client: openai.OpenAI, model: str) -> None:
    prompts = ["One, two,", "Caf\u00e9 \U0001f680 "]
    done = client.completions.create(model=model, prompt=prompts, max_tokens=4, temperature=0, echo=True, logprobs=1)
    assert len(done.choices) == 2
    for prompt, choice in zip(prompts, done.choices, strict=True):
        assert choice.text.startswith(prompt)
        logprobs = choice.logprobs
        assert logprobs and logprobs.text_offset and logprobs.tokens
        assert len(logprobs.text_offset) == len(logprobs.tokens)


def _be_refused(client: openai.OpenAI, model: str) -> None:
    for wrong, error in (
        ({"model": "nobody"}, openai.NotFoundError),
        ({"temperature": -1}, openai.BadRequestError),
        ({"messages": []}, openai.BadRequestError),
    ):
        given = {"model": model, "messages": [{"role": "user", "content": "x"}], "max_tokens": 1, **wrong}
        try:
            client.chat.completions.create(**given)
        except error:
            continue
        raise AssertionError(f"{wrong} was accepted")


async def _ask_at_once(url: str, model: str) -> None:
    async with openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none") as client:
        calls = [
            client.completions.create(model=model, prompt=f"{n} and", max_tokens=4, temperature=0) for n in range(8)
        ]
        assert len({answer.id for answer in await asyncio.gather(*calls)}) == 8


if __name__ == "__main__":
    main(*sys.argv[1:])
