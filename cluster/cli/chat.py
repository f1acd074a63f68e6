"""`moesaic chat`: a conversation in the terminal. Knows the history; knows no model."""

from __future__ import annotations

import asyncio
import contextlib
import importlib
from contextlib import aclosing
from typing import Annotated

import typer

from cluster.cli import flags
from cluster.cli.command_group import describe_error
from cluster.cli.generate import (
    FrequencyPenalty,
    MaxTokens,
    MinP,
    PresencePenalty,
    RepetitionPenalty,
    Seed,
    Temperature,
    TopK,
    TopP,
)
from cluster.cli.text_source import TextOptions, TextSource, open_source
from cluster.errors import MoesaicError

_HELP = "/exit ends, /reset forgets the conversation, Ctrl-C stops an answer"


def chat(
    model: flags.Model = None,
    url: flags.Url = None,
    api_key: flags.ApiKey = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = None,
    top_p: TopP = None,
    top_k: TopK = None,
    min_p: MinP = None,
    presence_penalty: PresencePenalty = None,
    frequency_penalty: FrequencyPenalty = None,
    repetition_penalty: RepetitionPenalty = None,
    seed: Seed = None,
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
    """Talk with MODEL in this process, or with the server at --url."""
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
    )
    typer.echo(f"{source.model}: {_HELP}")
    Conversation(source, options, system).run()


class Conversation:
    """Reads lines, streams answers, keeps the history."""

    def __init__(self, source: TextSource, options: TextOptions, system: str | None) -> None:
        self._source = source
        self._options = options
        self._opening: list[dict[str, str]] = [{"role": "system", "content": system}] if system else []
        self._messages = list(self._opening)

    def run(self) -> None:
        """Until /exit, the end of input, or Ctrl-C at the prompt."""
        with contextlib.suppress(ImportError):
            importlib.import_module("readline")  # gives `input` line editing
        with asyncio.Runner() as runner:
            while True:
                try:
                    line = input("> ").strip()
                except EOFError:
                    typer.echo()
                    return
                match line:
                    case "":
                        continue
                    case "/exit" | "/quit":
                        return
                    case "/reset":
                        self._messages = list(self._opening)
                        typer.echo("(forgotten)")
                    case _ if line.startswith("/"):
                        typer.echo(_HELP)
                    case _:
                        self._answer(runner, line)

    def _answer(self, runner: asyncio.Runner, line: str) -> None:
        """One turn. No answer takes the question back; a stopped answer stays in the history."""
        self._messages.append({"role": "user", "content": line})
        texts: list[str] = []
        try:
            runner.run(self._stream(texts))
        except KeyboardInterrupt:
            typer.echo(" (stopped)")
        except MoesaicError as error:
            typer.echo(describe_error(error), err=True)
            self._messages.pop()
            return
        answer = "".join(texts).strip()
        if answer:
            self._messages.append({"role": "assistant", "content": answer})
        else:
            self._messages.pop()

    async def _stream(self, texts: list[str]) -> None:
        async with aclosing(self._source.chat(self._messages, self._options)) as pieces:
            async for piece in pieces:
                text = piece.text if texts else piece.text.lstrip()
                if text:
                    texts.append(text)
                    typer.echo(text, nl=False)
        typer.echo()
