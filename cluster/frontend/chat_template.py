"""A checkpoint's chat template: messages in, prompt text out. Knows jinja; knows no tokens.

Renders as transformers does (same sandbox, same filters and functions), without importing transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

from cluster.errors import CheckpointError, InvalidRequest
from cluster.frontend.template_sandbox import BoundedSandbox

_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")
_TRIPS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class ChatTemplate:
    """One compiled template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, origin: str) -> None:
        """Compile `source`.

        Raises:
            CheckpointError: the template has a syntax error; names `origin`, the file it came from.
        """
        self._sandbox = _environment()
        try:
            self._template = self._sandbox.from_string(source)
        except jinja2.TemplateError as error:
            raise CheckpointError(f"{origin}: the chat template does not compile: {error}") from error
        self._special_tokens = dict(special_tokens)

    def render(
        self,
        messages: Sequence[Mapping[str, object]],
        *,
        add_generation_prompt: bool = True,
        kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for `messages`; `kwargs` are the template's own switches.

        Raises:
            InvalidRequest: the template refuses these messages, or a switch takes a reserved name.
        """
        for name in kwargs or {}:
            if name in _RESERVED:
                raise InvalidRequest(f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs")
        variables = {"tools": None, "documents": None, **self._special_tokens, **(kwargs or {})}
        try:
            with self._sandbox.limited():
                pieces = self._template.generate(
                    variables,
                    messages=[dict(message) for message in messages],
                    add_generation_prompt=add_generation_prompt,
                )
                return self._sandbox.joined(pieces)
        except _TRIPS as error:
            # A template is a program over the caller's messages: whatever it trips over is in the messages.
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error


class _GenerationTag(jinja2.ext.Extension):
    """`{% generation %}` marks assistant text for training; when serving it renders its body."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it as a plain class attribute

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _environment() -> BoundedSandbox:
    environment = BoundedSandbox(
        trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, jinja2.ext.loopcontrols]
    )
    names = cast("Any", environment)  # jinja leaves the values of both dictionaries untyped
    names.filters["tojson"] = _tojson
    names.globals.update(raise_exception=_raise_exception, strftime_now=_strftime_now)
    return environment


def _raise_exception(message: str) -> NoReturn:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: object,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes HTML characters, which a prompt must not contain.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)
