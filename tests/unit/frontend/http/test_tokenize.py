"""/tokenize and /detokenize."""

from __future__ import annotations

import asyncio


def test_prompts_and_chats_are_counted_as_the_model_sees_them(make_app, call, tokenizer):
    messages = [{"role": "user", "content": "What is 12 + 30?"}]

    async def scenario():
        app = make_app()
        prompt = await call(app, "POST", "/tokenize", json={"prompt": "naïve one", "return_token_strs": True})
        chat = await call(app, "POST", "/tokenize", json={"model": "moesaic-demo", "messages": messages})
        bare = await call(app, "POST", "/tokenize", json={"messages": messages, "add_generation_prompt": False})
        empty = await call(app, "POST", "/tokenize", json={"prompt": ""})
        return prompt.json(), chat.json(), bare.json(), empty.json()

    prompt, chat, bare, empty = asyncio.run(scenario())
    ids = tokenizer.encode("naïve one")
    assert (prompt["count"], prompt["max_model_len"], prompt["tokens"]) == (len(ids), 2048, ids)
    assert len(prompt["token_strs"]) == len(ids)
    assert prompt["token_strs"][-1].startswith("Ġ"), "as the vocabulary writes it"
    expected = tokenizer.encode(tokenizer.apply_chat_template(messages), add_special_tokens=False)
    assert (chat["tokens"], chat["token_strs"]) == (expected, None)
    assert bare["tokens"] == expected[: bare["count"]] and bare["count"] < chat["count"]
    assert empty["tokens"] == []


def test_detokenize_is_the_inverse_special_tokens_included(make_app, call, tokenizer):
    text = "naïve <|im_end|> one"

    async def scenario():
        return await call(make_app(), "POST", "/detokenize", json={"tokens": tokenizer.encode(text)})

    assert asyncio.run(scenario()).json() == {"prompt": text}
