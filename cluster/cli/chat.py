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
from cluster.cli.generate import SAMPLING, MaxTokens
from cluster.cli.settings import ENGINE, settings
from cluster.cli.text_source import TextOptions, TextSource, open_source
from cluster.errors import MoesaicError

_HELP = "/exit ends, /reset forgets the conversation, Ctrl-C stops an answer"


@flags.in_place_of("sampling", SAMPLING)
@flags.in_place_of("said", settings(*ENGINE))
def chat(
    *,
    url: flags.Url = None,
    api_key: flags.ApiKey = None,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
    max_tokens: MaxTokens = 256,
    sampling: flags.Said,
    said: flags.Said,
) -> None:
    """Talk with MODEL in this process, or with the server at --url."""
    config = flags.read_config(said) if url is None else None
    source = open_source(url, model=said["model"], api_key=api_key, config=config)
    options = TextOptions(max_tokens=max_tokens, **sampling)
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
