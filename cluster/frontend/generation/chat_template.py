"""A checkpoint's chat template: messages in, prompt text out. Knows jinja; knows no tokens.

Renders as transformers does (same sandbox, same filters and functions), without importing transformers.
"""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any, NoReturn, cast

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.parser import Parser

from cluster.errors import CheckpointError, InvalidRequest
from cluster.frontend.generation.template_sandbox import BoundedSandbox

_RESERVED = ("messages", "add_generation_prompt", "tools", "documents")
_MARK = "\ue000here the message goes on\ue001 "  # its last space tells templates that strip messages from others
_TRIPS = (jinja2.TemplateError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError, RecursionError)


class ChatTemplate:
    """One compiled template with the special tokens it may name."""

    def __init__(self, source: str, special_tokens: Mapping[str, str], *, origin: str) -> None:
        """Compile `source`.

        Raises:
            CheckpointError: the template has a syntax error; names `origin`, the file it came from.
        """
        self.source = source
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
        continue_final_message: bool = False,
        tools: Sequence[Mapping[str, object]] | None = None,
        kwargs: Mapping[str, object] | None = None,
    ) -> str:
        """The prompt for `messages`; `kwargs` are the template's own switches.

        Args:
            messages: arguments of tool calls are mappings; a template that trips over those gets them as JSON strings.
            continue_final_message: end the prompt where the text of the last message ends.
            tools: that the model is told of.
        Raises:
            InvalidRequest: the template refuses these messages, or a switch takes a reserved name.
        """
        for name in kwargs or {}:
            if name in _RESERVED:
                raise InvalidRequest(f"chat_template_kwargs may not set {name!r}", param="chat_template_kwargs")
        given = [dict(message) for message in messages]
        if continue_final_message:
            given[-1] = _marked(given[-1])
        variables = {"tools": tools or None, "documents": None, **self._special_tokens, **(kwargs or {})}
        variables["add_generation_prompt"] = add_generation_prompt
        text = self._rendered(variables, given)
        return _up_to_mark(text) if continue_final_message else text

    def _rendered(self, variables: Mapping[str, object], messages: Sequence[Mapping[str, object]]) -> str:
        try:
            return self._generated(variables, messages)
        except _TRIPS as error:
            as_strings = [_with_json_arguments(message) for message in messages]
            if as_strings != messages:
                with contextlib.suppress(*_TRIPS):
                    return self._generated(variables, as_strings)
            # A template is a program over the caller's messages: whatever it trips over is in the messages.
            raise InvalidRequest(
                f"the model's chat template refused the messages: {error}", param="messages"
            ) from error

    def _generated(self, variables: Mapping[str, object], messages: Sequence[Mapping[str, object]]) -> str:
        with self._sandbox.limited():
            return self._sandbox.joined(self._template.generate(variables, messages=messages))


def _marked(message: Mapping[str, object]) -> dict[str, object]:
    """The last message with a mark behind its text, which shows where a template puts it.

    Raises:
        InvalidRequest: it has no text to continue.
    """
    content = message.get("content")
    if not isinstance(content, str) or not content:
        raise InvalidRequest("continue_final_message needs text in the last message", param="continue_final_message")
    return {**message, "content": content + _MARK}


def _up_to_mark(text: str) -> str:
    """What a template wrote before the mark; without the space before it where the template strips messages.

    Raises:
        InvalidRequest: the template does not write the last message.
    """
    before, found, after = text.rpartition(_MARK.strip())
    if not found:
        message = "the model's chat template does not show the last message, so it cannot be continued"
        raise InvalidRequest(message, param="continue_final_message")
    return before if after.startswith(_MARK[len(_MARK.rstrip()) :]) else before.rstrip()


def _with_json_arguments(message: Mapping[str, object]) -> dict[str, object]:
    """A message whose tool calls have their arguments as OpenAI writes them: JSON in a string."""
    calls = cast("list[dict[str, Any]]", message.get("tool_calls") or [])
    written: list[dict[str, Any]] = []
    for call in calls:
        function: object = call.get("function")
        if isinstance(function, dict):
            fields = cast("dict[str, Any]", function)
            written.append({**call, "function": {**fields, "arguments": _tojson(fields.get("arguments"))}})
        else:
            written.append(call)
    return {**message, "tool_calls": written} if calls else dict(message)


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
