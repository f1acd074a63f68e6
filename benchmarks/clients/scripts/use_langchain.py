"""langchain-openai: invoke, stream, batch, completions.

use_langchain.py URL MODEL FOLDER
"""

from __future__ import annotations

import asyncio
import sys

from langchain_openai import ChatOpenAI, OpenAI


def main(url: str, model: str, _folder: str) -> None:
    """Raises AssertionError or the client's own error."""
    chat = ChatOpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=16, max_retries=0)
    whole = chat.invoke([("system", "Answer shortly."), ("human", "What is 12 + 30?")])
    assert whole.usage_metadata and whole.usage_metadata["output_tokens"] > 0
    pieces = list(chat.stream([("system", "Answer shortly."), ("human", "What is 12 + 30?")]))
    assert "".join(str(piece.content) for piece in pieces) == whole.content
    assert len(chat.batch(["One", "Two", "Three"])) == 3
    assert asyncio.run(chat.ainvoke("Hello")).content is not None
    assert chat.bind(logprobs=True).invoke("Hello").response_metadata["logprobs"]
    complete = OpenAI(base_url=f"{url}/v1", api_key="none", model=model, temperature=0, max_tokens=8, max_retries=0)
    assert complete.invoke("One, two,")
    assert complete.batch(["One", "Two"])
    print("invoke, stream, batch, ainvoke, logprobs, completions: right")


if __name__ == "__main__":
    main(*sys.argv[1:])
