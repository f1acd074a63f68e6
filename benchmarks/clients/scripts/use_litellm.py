"""litellm: completion, stream, asynchronous, text completion.

use_litellm.py URL MODEL FOLDER
"""

from __future__ import annotations

import asyncio
import sys

import litellm


def main(url: str, model: str, _folder: str) -> None:
    """Raises AssertionError or the client's own error."""
    where = {"api_base": f"{url}/v1", "api_key": "none"}
    messages = [{"role": "user", "content": "What is 12 + 30?"}]
    ask = {"model": f"openai/{model}", "messages": messages, "temperature": 0, "max_tokens": 16, **where}
    whole = litellm.completion(**ask)
    assert whole.usage.total_tokens == whole.usage.prompt_tokens + whole.usage.completion_tokens
    streamed = "".join(
        chunk.choices[0].delta.content or ""
        for chunk in litellm.completion(**ask, stream=True, stream_options={"include_usage": True})
        if chunk.choices
    )
    assert streamed == whole.choices[0].message.content
    assert asyncio.run(litellm.acompletion(**ask)).choices[0].message.content == streamed
    text = litellm.text_completion(
        model=f"text-completion-openai/{model}", prompt="One, two,", max_tokens=8, temperature=0, **where
    )
    assert text.choices[0].text
    print("completion, stream, acompletion, text_completion: right")


if __name__ == "__main__":
    main(*sys.argv[1:])
