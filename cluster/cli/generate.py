"""`moesaic generate`: one completion, streamed to the terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from typing import Annotated

import typer

from cluster.cli import flags
from cluster.cli.settings import ENGINE, settings
from cluster.cli.text_source import TextOptions, TextSource, open_source
from cluster.errors import InvalidRequest

MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
SAMPLING = {
    "temperature": Annotated[float | None, typer.Option(help="0 is greedy; default: the model's, else 1.")],
    "top_p": Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")],
    "top_k": Annotated[int | None, typer.Option(help="Keep this many tokens; 0: all.")],
    "min_p": Annotated[
        float | None, typer.Option(help="Keep tokens at least this likely, as a share of the likeliest.")
    ],
    "presence_penalty": Annotated[float | None, typer.Option(help="Taken off tokens that were generated; -2 to 2.")],
    "frequency_penalty": Annotated[
        float | None, typer.Option(help="Taken off each time a token was generated; -2 to 2.")
    ],
    "repetition_penalty": Annotated[
        float | None, typer.Option(help="Above 1 makes tokens of prompt and answer less likely.")
    ],
    "seed": Annotated[int | None, typer.Option(help="Same seed, same text; default: random.")],
}
"""Flags of `generate` and `chat`; their names are fields of TextOptions."""


@flags.in_place_of("sampling", SAMPLING)
@flags.in_place_of("said", settings(*ENGINE))
def generate(
    *,
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    url: flags.Url = None,
    api_key: flags.ApiKey = None,
    max_tokens: MaxTokens = 128,
    sampling: flags.Said,
    stop: Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")] = None,
    as_json: flags.AsJson = False,
    said: flags.Said,
) -> None:
    """Continue a text with MODEL in this process, or with the server at --url."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InvalidRequest("the prompt is empty")
    config = flags.read_config(said) if url is None else None
    source = open_source(url, model=said["model"], api_key=api_key, config=config)
    options = TextOptions(max_tokens=max_tokens, stop=tuple(stop) if stop else None, **sampling)
    asyncio.run(_print_completion(source, text, options, as_json=as_json))


async def _print_completion(source: TextSource, prompt: str, options: TextOptions, *, as_json: bool) -> None:
    texts: list[str] = []
    finish_reason: str | None = None
    async with aclosing(source.complete(prompt, options)) as pieces:
        async for piece in pieces:
            texts.append(piece.text)
            finish_reason = piece.finish_reason or finish_reason
            if not as_json:
                typer.echo(piece.text, nl=False)
    if as_json:
        answer = {"model": source.model, "prompt": prompt, "text": "".join(texts), "finish_reason": finish_reason}
        typer.echo(json.dumps(answer, ensure_ascii=False))
    else:
        typer.echo()
