"""`moesaic generate`: one completion, streamed to the terminal."""

from __future__ import annotations

import asyncio
import json
import sys
from contextlib import aclosing
from typing import Annotated

import typer

from cluster.cli import flags
from cluster.cli.text_source import TextOptions, TextSource, open_source
from cluster.errors import InvalidRequest

MaxTokens = Annotated[int, typer.Option(help="Most tokens to generate.")]
Temperature = Annotated[float | None, typer.Option(help="0 is greedy; default: the model's, else 1.")]
TopP = Annotated[float | None, typer.Option(help="Keep the likeliest tokens up to this probability.")]
TopK = Annotated[int | None, typer.Option(help="Keep this many tokens; 0: all.")]
MinP = Annotated[float | None, typer.Option(help="Keep tokens at least this likely, as a share of the likeliest.")]
PresencePenalty = Annotated[float | None, typer.Option(help="Taken off tokens that were generated; -2 to 2.")]
FrequencyPenalty = Annotated[float | None, typer.Option(help="Taken off each time a token was generated; -2 to 2.")]
RepetitionPenalty = Annotated[float | None, typer.Option(help="Above 1 makes tokens of prompt and answer less likely.")]
Seed = Annotated[int | None, typer.Option(help="Same seed, same text; default: random.")]
Stop = Annotated[list[str] | None, typer.Option(help="End before this text; may be given several times.")]


def generate(
    prompt: Annotated[str, typer.Option(help="Text to continue; - reads it from standard input.")],
    model: flags.Model = None,
    url: flags.Url = None,
    api_key: flags.ApiKey = None,
    max_tokens: MaxTokens = 128,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
    stop: Stop = None,
    as_json: flags.AsJson = False,
    config: flags.ConfigFile = None,
    expert_cache: flags.ExpertCache = None,
    eviction: flags.Eviction = None,
    prediction: flags.Prediction = None,
    ram_tier: flags.RamTier = None,
    link_gb_per_s: flags.LinkRate = None,
    policy_state: flags.PolicyState = None,
    kv_cache: flags.KvCache = None,
    max_model_len: flags.MaxModelLen = None,
    dtype: flags.Dtype = None,
    generation_config: flags.GenerationConfig = None,
    threads: flags.Threads = None,
) -> None:
    """Continue a text with MODEL in this process, or with the server at --url."""
    text = sys.stdin.read() if prompt == "-" else prompt
    if not text:
        raise InvalidRequest("the prompt is empty")
    overrides = flags.engine_overrides(
        model=model,
        expert_cache=expert_cache,
        kv_cache=kv_cache,
        max_model_len=max_model_len,
        dtype=dtype,
        generation_config=generation_config,
        threads=threads,
        eviction=eviction,
        prediction=prediction,
        ram_tier=ram_tier,
        link_gb_per_s=link_gb_per_s,
        policy_state=policy_state,
    )
    settings = flags.read_config(config, overrides) if url is None else None
    source = open_source(url, model=model, api_key=api_key, config=settings)
    options = TextOptions(
        max_tokens=max_tokens,
        temperature=temperature,
        top_p=top_p,
        top_k=top_k,
        min_p=min_p,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        repetition_penalty=repetition_penalty,
        seed=seed,
        stop=tuple(stop) if stop else None,
    )
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
